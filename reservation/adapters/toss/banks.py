"""The PG's banks: maps codes to names and names to codes.

The PG returns its own two-character bank code, and accepts a code or its Korean or English name.
"""

from typing import Final, NamedTuple

__all__ = ["BANKS", "Bank", "bank_code", "bank_of"]


class Bank(NamedTuple):
    """One bank, with the names that customers see."""

    korean: str
    english: str
    #: The PG's own names of the bank.
    words: tuple[str, ...] = ()


#: By the PG's code. The national code has three digits: a zero and the PG's code, except for KB
#: Kookmin (004).
BANKS: Final = {
    "02": Bank("KDB산업은행", "Korea Development Bank", ("산업", "KDBBANK")),
    "03": Bank("IBK기업은행", "Industrial Bank of Korea", ("기업", "IBK")),
    "06": Bank("KB국민은행", "KB Kookmin Bank", ("국민", "KOOKMIN", "004")),
    "07": Bank("Sh수협은행", "Suhyup Bank", ("수협", "SUHYEOP")),
    "11": Bank("NH농협은행", "NongHyup Bank", ("농협", "NONGHYEOP")),
    "12": Bank("단위농협", "Local NongHyup", ("지역농축협", "LOCALNONGHYEOP")),
    "20": Bank("우리은행", "Woori Bank", ("우리", "WOORI")),
    "23": Bank("SC제일은행", "Standard Chartered Bank Korea", ("SC제일", "SC")),
    "27": Bank("씨티은행", "Citibank Korea", ("씨티", "CITI")),
    "31": Bank("iM뱅크(대구)", "iM Bank (Daegu)", ("대구", "iM뱅크", "대구은행", "DAEGUBANK")),
    "32": Bank("부산은행", "Busan Bank", ("부산", "BUSANBANK")),
    "34": Bank("광주은행", "Kwangju Bank", ("광주", "GWANGJUBANK")),
    "35": Bank("제주은행", "Jeju Bank", ("제주", "JEJUBANK")),
    "37": Bank("전북은행", "Jeonbuk Bank", ("전북", "JEONBUKBANK")),
    "39": Bank("경남은행", "Kyongnam Bank", ("경남", "KYONGNAMBANK")),
    "45": Bank("새마을금고", "MG Community Credit Cooperatives", ("새마을", "SAEMAUL")),
    "48": Bank("신협", "Credit Union", ("신협중앙회", "SHINHYEOP")),
    "50": Bank("저축은행중앙회", "Federation of Savings Banks", ("저축", "저축은행", "SAVINGBANK")),
    "54": Bank("홍콩상하이은행", "HSBC", ("HSBC",)),
    "64": Bank("산림조합", "National Forestry Cooperative", ("산림", "SANLIM")),
    "71": Bank("우체국", "Korea Post", ("우체국예금보험", "POST")),
    "81": Bank("하나은행", "Hana Bank", ("하나", "HANA")),
    "88": Bank("신한은행", "Shinhan Bank", ("신한", "SHINHAN")),
    "89": Bank("케이뱅크", "K Bank", ("케이", "KBANK")),
    "90": Bank("카카오뱅크", "Kakao Bank", ("카카오", "KAKAOBANK")),
    "92": Bank("토스뱅크", "Toss Bank", ("토스", "TOSSBANK")),
}


def _key(text: str) -> str:
    """A normalized name for comparison."""
    return "".join(text.split()).casefold()


_CODES: Final = {
    _key(name): code
    for code, bank in BANKS.items()
    for name in (code, bank.korean, bank.english, *bank.words)
}


def bank_code(text: str) -> str:
    """The PG's code of a bank, from its code or any of its names; other text is unchanged."""
    key = _key(text)
    return _CODES.get(key) or _CODES.get(key.removeprefix("0")) or text


def bank_of(text: str) -> Bank:
    """The bank of a code or a name; an unlisted bank has the text as its name."""
    return BANKS.get(bank_code(text), Bank(text, text))
