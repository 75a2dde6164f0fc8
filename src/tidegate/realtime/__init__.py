"""Realtime sessions: WebSockets between a client and a provider, relayed message by message."""
