"""gunicorn with consumers beside HTTP: CONSUMERS=shop:runtime gunicorn -c gunicorn.conf.py shop.web:app.

GREENCONSUME_BROKER, where it is set, says from which broker they consume, as for `greenconsume run`.
"""

import os

from greenconsume.gunicorn import consumers

bind = os.environ.get("BIND", "127.0.0.1:8000")
worker_class = "gevent"
workers = int(os.environ.get("WORKERS", "2"))
# Requests and handlers have so long to end; then handlers are cancelled, and their messages go back.
graceful_timeout = 30
# A worker that does not answer for so long is replaced, and the message that hung it set aside.
timeout = 60
# Now and then a fresh worker: its consumers drain first, while HTTP is served.
max_requests = 100_000
max_requests_jitter = 10_000
control_socket_disable = True
broker = os.environ.get("GREENCONSUME_BROKER")
options = {"broker": broker} if broker else {}
post_worker_init = consumers(os.environ.get("CONSUMERS", "shop:runtime"), freeze_gc=True, **options)
