"""What every wing needs of the operating system: child processes, durable files, memory, back-off."""
