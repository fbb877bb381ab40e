"""What happens next, decided without touching anything: no I/O, no clock, no chance. They come in as arguments."""
