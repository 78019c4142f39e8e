"""Calls of the scripts for sales of several partitions: transfers of stock, and readings."""
