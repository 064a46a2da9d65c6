"""KiteMQ: a message queue of the RocketMQ class. This is the client SDK."""
