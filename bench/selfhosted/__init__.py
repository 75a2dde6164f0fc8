"""Bench of GPU servers of one's own: the emulated one and llama.cpp's, direct and through us."""
