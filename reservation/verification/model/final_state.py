"""Final state: the orders, counters and money of a sale against the result of its events."""

from reservation.verification.model.event_data import BALANCE
from reservation.verification.model.history_format import End, MoneyLine, OrderLine, StockLine
from reservation.verification.model.report import Judgement
from reservation.verification.model.sale_state import SaleState
from reservation.verification.model.violations import Broken

__all__ = ["Books"]


class Books:
    """The last lines of one sale."""

    def __init__(self, judgement: Judgement) -> None:
        self._judgement = judgement
        self._orders: dict[str, tuple[int, OrderLine]] = {}
        self._stock: dict[str, tuple[int, StockLine]] = {}
        self._balance: dict[str, int] = {}

    def order(self, line: int, order: OrderLine) -> None:
        """An order as SQL has it."""
        self._orders[order.order] = line, order

    def stock(self, line: int, stock: StockLine) -> None:
        """An item's counters."""
        self._stock[stock.sku] = line, stock

    def money(self, line: int, money: MoneyLine) -> None:
        """An entry of the PG's ledger."""
        del line
        sign = BALANCE[money.entry]
        self._balance[money.order] = self._balance.get(money.order, 0) + sign * money.amount

    def close(self, line: int, end: End, state: SaleState) -> None:
        """Compare the final state with the result of the events; each kind where it is complete."""
        states = [order.status for order in state.orders.values()]
        self._judgement.undecided += states.count("CONFIRMING")
        if end.orders:
            self._close_orders(line, state)
        if end.stock:
            self._close_stock(line, state)
        if end.money:
            self._close_money(line, state)

    def _close_orders(self, line: int, state: SaleState) -> None:
        found = self._judgement.found
        self._judgement.orders_compared += len(self._orders)
        for order_id, (at, row) in self._orders.items():
            order = state.orders.get(order_id)
            if order is None:
                found(at, Broken.FINAL, f"{order_id} is in SQL, but has no event")
            elif (row.status, row.amount) != (order.status, order.amount):
                due = f"{order.status} for {order.amount}"
                reason = (
                    f"{order_id} is {row.status} for {row.amount} in SQL, expected {due} by its "
                    "events"
                )
                found(at, Broken.FINAL, reason)
        for order_id in state.orders.keys() - self._orders.keys():
            found(line, Broken.FINAL, f"{order_id} is not in SQL")

    def _close_stock(self, line: int, state: SaleState) -> None:
        found = self._judgement.found
        self._judgement.stock_compared += len(self._stock)
        for sku, (at, row) in self._stock.items():
            item = state.items.get(sku)
            counted = row.total, row.available, row.held, row.sold
            if item is None or item.row != counted:
                reason = f"{sku}: {counted} at the end, {item and item.row} by its events"
                found(at, Broken.COUNTERS, reason)
        for sku in state.items.keys() - self._stock.keys():
            found(line, Broken.COUNTERS, f"{sku} has no counters at the end")

    def _close_money(self, line: int, state: SaleState) -> None:
        self._judgement.money_compared += len(self._balance)
        for order_id in sorted(state.orders.keys() | self._balance.keys()):
            order, kept = state.orders.get(order_id), self._balance.get(order_id, 0)
            if order is not None and order.status == "CONFIRMING":
                continue
            owed = order.amount if order is not None and order.status == "CONFIRMED" else 0
            if kept != owed:
                name = Broken.UNPAID if kept < owed else Broken.MONEY
                reason = f"{order_id}: the PG's balance is {kept}, the order's amount {owed}"
                self._judgement.found(line, name, reason)
