"""Makes sealed.bin with libsodium (pip install pynacl): what `seal.rs` must give, byte by byte."""

from pathlib import Path

from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_encrypt as encrypt

head = b"CWSEALED" + bytes([1])
nonce = bytes(range(24))
key = bytes(255 - at for at in range(32))
content = "A person's words: größer als 3 €.".encode()
sealed = encrypt(content, head + b"samples/000001.jsonl", nonce, key)
Path(__file__).with_name("sealed.bin").write_bytes(head + nonce + sealed)
