"""The scripts that only a sale of several partitions needs: transfers of stock, and readings."""
