"""GPU server of one's own: slots, KV cache, a silent queue, the words of llama.cpp and others."""
