"""What runs inside a box, under a bare interpreter: only the standard library is imported here."""
