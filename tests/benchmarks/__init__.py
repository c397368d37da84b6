"""Figures, never verdicts: greenconsume beside kombu's own mixins and its peers, on one RabbitMQ."""
