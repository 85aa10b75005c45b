#error "the simulator has no CUB (see the book's appendix on the simulator)"
