#error "the simulator has no cooperative groups (see the book's appendix on the simulator)"
