"""Encodes the sample messages a second time, from docs/wire.md and RFC 8032 and not from the crate, into messages.txt.

    python3 make.py > messages.txt
"""

import hashlib
import struct

# Ed25519 after RFC 8032, section 5.1: slow and short.
P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
Y = 4 * pow(5, P - 2, P) % P


def recover_x(y):
    x2 = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(x2, (P + 3) // 8, P)
    if (x * x - x2) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    return P - x if x & 1 else x


B = (recover_x(Y), Y)


def add(a, b):
    (x1, y1), (x2, y2) = a, b
    t = D * x1 * x2 * y1 * y2 % P
    x = (x1 * y2 + x2 * y1) * pow(1 + t, P - 2, P) % P
    y = (y1 * y2 + x1 * x2) * pow(1 - t, P - 2, P) % P
    return x, y


def times(n, point):
    total = (0, 1)
    while n:
        if n & 1:
            total = add(total, point)
        point = add(point, point)
        n >>= 1
    return total


def pack(point):
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def number(data):
    return int.from_bytes(hashlib.sha512(data).digest(), "little")


def keys(seed):
    hashed = hashlib.sha512(seed).digest()
    scalar = int.from_bytes(hashed[:32], "little") & (1 << 254) - 8 | 1 << 254
    return scalar, hashed[32:], pack(times(scalar, B))


def sign(seed, message):
    scalar, prefix, public = keys(seed)
    r = number(prefix + message) % L
    point = pack(times(r, B))
    s = (r + number(point + public + message) * scalar) % L
    return point + s.to_bytes(32, "little")


# postcard: https://postcard.jamesmunns.com/wire-format
def varint(n):
    out = b""
    while n >= 0x80:
        out += bytes([n & 0x7F | 0x80])
        n >>= 7
    return out + bytes([n])


def sized(data):
    return varint(len(data)) + data


def some(data):
    return b"\x01" + data


NONE = b"\x00"


def f32(x):
    return struct.pack("<f", x)


def f64(x):
    return struct.pack("<d", x)


def flag(x):
    return bytes([x])


SEED = bytes([5]) * 32
DEVICE = bytes([0x11]) * 16
DIGEST = bytes([0x22]) * 32
HASH = bytes([0x33]) * 32
TOKEN = bytes([0x44]) * 32
BASE = bytes([0xBA]) * 32
CSR = bytes([0x30, 3, 2, 1, 5])
CHAIN = varint(2) + sized(bytes([0xC1]) * 4) + sized(bytes([0xC2]) * 3)
PUBLIC = keys(SEED)[2]
SEED_BEFORE = bytes([4]) * 32

chunk = varint(1 << 20) + HASH + sized(b"abc")
report = b"".join(map(varint, [60, 41, 12, 0, 7, 9, 50, 123456])) + f32(2.5) + f32(1.25) + f32(0.75)
opening = varint(300) + BASE + DIGEST + varint(1234567) + varint(48) + report + some(bytes([0x55]) * 16 + bytes([0x66]) * 8)
train = b"".join(map(varint, [50, 5, 8, 512])) + f32(0.001) + f32(0.01) + f32(1.0) + f32(0.1)
compress = bytes([4]) + varint(64) + some(f32(0.25)) + flag(True) + flag(True) + bytes([1])
start = varint(2) + DIGEST + varint(70000)
control = varint(299) + varint(0b1101) + BASE + HASH + varint(70100)
scaffold = varint(2) + control + sized(sign(SEED, b"commonweal control v1\0" + control))
task = varint(300) + BASE + start + varint(2) + train + scaffold + compress + varint(2**64 - 1) + varint(600000)
reconnect = varint(30000) + varint(5000)
gates = (
    varint(2)
    + varint(1) + varint(1) + f64(0.1) + f64(0.04) + flag(True)
    + varint(4) + varint(1) + f64(0.05) + f64(0.0625) + flag(False)
)
counts = b"".join(map(varint, [10, 9, 8, 1, 1, 600, 410, 120, 0, 70, 12345678, 50]))
card = some(f64(0.97)) + some(f64(0.04)) + NONE + some(f64(2.125)) + gates + sized(b"fedit, mean, fedadam, scaffold") + counts
release = varint(3) + some(varint(2)) + some(varint(300)) + BASE + DIGEST + varint(70000) + card + varint(1767225600000)
signed_release = release + sized(sign(SEED, b"commonweal release v1\0" + release))
succession = varint(300) + PUBLIC + varint(1767225600000)
successions = varint(1) + succession + sized(sign(SEED_BEFORE, b"commonweal succession v1\0" + succession))
receipt = varint(300) + DEVICE + DIGEST + varint(1234567) + varint(1767225600000)
accepted = receipt + sized(sign(SEED, b"commonweal receipt v1\0" + receipt)) + reconnect

MESSAGES = {
    "request poll": varint(0) + BASE + some(varint(2)) + varint(299) + some(varint(7) + varint(2)),
    "request open": varint(1) + opening,
    "request chunk": varint(2) + chunk,
    "request finish": varint(3),
    "request fetch": varint(4) + DIGEST + varint(1 << 20),
    "request renew": varint(5) + sized(CSR),
    "reply refused": varint(0) + varint(10) + reconnect,
    "reply poll": varint(1) + some(task) + some(signed_release) + successions + reconnect,
    "reply poll empty": varint(1) + NONE + NONE + varint(0) + reconnect,
    "reply offset": varint(2) + varint(1 << 20),
    "reply accepted": varint(3) + accepted,
    "reply content": varint(4) + DIGEST + varint(70000),
    "reply chunk": varint(5) + chunk,
    "reply renewed": varint(6) + CHAIN,
    "enrolment request": varint(0) + TOKEN + sized(CSR),
    "enrolment refused": varint(0) + varint(7) + reconnect,
    "enrolment enrolled": varint(1) + DEVICE + CHAIN + PUBLIC + varint(300),
}

for name, payload in MESSAGES.items():
    body = b"\x03" + payload
    print(f"{name}: {(struct.pack('<I', len(body)) + body).hex()}")
