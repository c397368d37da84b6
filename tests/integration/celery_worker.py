"""A Celery worker over the green transport, or a peer of it: started by its path, as a process of its own.

python celery_worker.py URL QUEUE green|stock [OPTION ...]

It prints the body of each task that it did, late acknowledged; a task `rest` takes 0.2 s.
"""

# ruff: noqa: E402  # nothing may be imported before the patching

import sys

from gevent import monkey

monkey.patch_all()

if sys.argv[3] == "green":
    import greenconsume

    greenconsume.patch_all()

import time

from celery import Celery
from kombu import Exchange, Queue

url, name = sys.argv[1:3]
app = Celery(broker=url)
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_queues=[Queue(name, Exchange(""), name)],
    worker_prefetch_multiplier=1,
)


@app.task(name="tell")
def tell(body: object) -> None:
    print("did", body, file=sys.__stdout__, flush=True)


@app.task(name="rest")
def rest(body: object) -> None:
    time.sleep(0.2)
    print("did", body, file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    options = ["--pool", "gevent", "--concurrency", "20", *sys.argv[4:]]
    app.worker_main(["--quiet", "worker", *options])
