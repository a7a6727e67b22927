"""The closed list of commands, their data, answers and errors, and the channel they travel on."""
