"""What the machine is and how it is doing: memory, processors, accelerators, battery."""
