"""What both packages of Lightning get: written once, and derived from the classes of either."""
