"""Measurements that anyone can repeat. No test asserts any of them."""
