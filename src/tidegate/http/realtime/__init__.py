"""Front of realtime sessions: a request that becomes a WebSocket."""
