"""SFA in the trainers that people use: thin translations of their events."""
