"""Those who answer: one module per upstream dialect, and the emulator."""
