"""A server on loopback that writes prepared websocket frames as fast as the other side reads them, or at a given rate.

    python benchmarks/flood.py FRAMES RATE     (RATE in messages a second, 0 is as fast as they are read)

FRAMES is a file with one frame a line, the snapshot first. The port is printed. Frames begin to flow when a client
has sent a text that names an order book; the server ends when the client leaves.
"""

import asyncio
import base64
import hashlib
import sys
import time

import orjson

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def framed(payload: bytes, opcode: int = 1) -> bytes:
    "A websocket frame as a server sends it"
    n = len(payload)
    if n < 126:
        return bytes((0x80 | opcode, n)) + payload
    if n < 65_536:
        return bytes((0x80 | opcode, 126)) + n.to_bytes(2, "big") + payload
    return bytes((0x80 | opcode, 127)) + n.to_bytes(8, "big") + payload


async def read_frame(reader) -> tuple[int, bytes]:
    "A frame as a client sends it"
    first, second = await reader.readexactly(2)
    n = second & 127
    if n > 125:
        n = int.from_bytes(await reader.readexactly(2 if n == 126 else 8), "big")
    mask = await reader.readexactly(4)
    payload = await reader.readexactly(n)
    return first & 15, bytes(b ^ mask[i % 4] for i, b in enumerate(payload))


async def flood(writer, frames, rate):
    "Write all frames"
    began, size = time.perf_counter(), 200 if not rate else max(1, int(rate / 200))
    for start in range(0, len(frames), size):
        writer.write(b"".join(frames[start : start + size]))
        await writer.drain()
        if rate and (early := began + start / rate - time.perf_counter()) > 0:
            await asyncio.sleep(early)


async def serve(frames, rate):
    "Serve one client"
    over = asyncio.Event()

    async def client(reader, writer):
        request = await reader.readuntil(b"\r\n\r\n")
        key = next(x.split(b":", 1)[1].strip() for x in request.split(b"\r\n")
                   if x.lower().startswith(b"sec-websocket-key"))  # fmt: skip
        accept = base64.b64encode(hashlib.sha1(key + GUID).digest())
        head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        writer.write(head + b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")
        task = None
        try:
            while True:
                opcode, payload = await read_frame(reader)
                if opcode == 9:
                    writer.write(framed(payload, 10))
                elif opcode == 8:
                    break
                elif opcode == 1 and b'"subscribe"' in payload:
                    req = orjson.loads(payload).get("req_id", "")
                    answer = {"success": True, "ret_msg": "", "conn_id": "1", "op": "subscribe"}
                    writer.write(framed(orjson.dumps({**answer, "req_id": req})))
                    if task is None and b"orderbook" in payload:
                        task = asyncio.ensure_future(flood(writer, frames, rate))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        if task is not None:
            task.cancel()
        writer.close()
        over.set()

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    try:
        await asyncio.wait_for(over.wait(), 300)
    finally:
        server.close()


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        content = [framed(line) for line in file.read().split(b"\n") if line]
    asyncio.run(serve(content, float(sys.argv[2])))
