#error "the simulator has no cuRAND (see the book's appendix on the simulator)"
