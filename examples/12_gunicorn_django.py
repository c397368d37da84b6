"""Django that publishes, with consumers in the same gunicorn worker: see deploy/gunicorn.conf.py."""

import json
import os

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse, JsonResponse
from django.urls import path
from kombu import Queue

from greenconsume import ConsumerMixin, Publisher, Runtime

BROKER = os.environ.get("GREENCONSUME_BROKER", "memory://")
publisher = Publisher(BROKER, timeout=2.0)  # in a project: a module of an app
runtime = Runtime(BROKER)
orders = Queue("orders")
shipped = []


class Shipping(ConsumerMixin):
    def get_consumers(self, Consumer, channel):
        return [Consumer([orders], callbacks=[self.on_order])]

    def on_order(self, body, message):
        shipped.append(body)
        message.ack()


def order(request):
    publisher.publish(json.loads(request.body), "orders", declare=[orders])  # confirmed
    return HttpResponse(status=202)


runtime.spawn(Shipping())
urlpatterns = [path("orders", order), path("shipped", lambda _: JsonResponse(shipped, safe=False))]
settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="an example's")
app = get_wsgi_application()
