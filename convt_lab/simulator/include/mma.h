#error "the simulator has no wmma fragments (see the book's appendix on the simulator)"
