"""Where the processor time of a call goes: samples of our own processes, by room."""
