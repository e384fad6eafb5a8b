"""The least that a server must do with an upload: receive it by aiohttp, write it, fsync it, answer.

    python -m benchmarks.load.sink FOLDER

No credential, no record, no check, no row. What the coordinator reaches is a share of this.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from aiohttp import web


async def _serve(folder: Path) -> None:
    async def put(request: web.Request) -> web.Response:
        with (folder / request.match_info["name"]).open("xb", buffering=0) as file:
            async for piece in request.content.iter_any():
                file.write(piece)
            await asyncio.to_thread(os.fsync, file.fileno())
        return web.Response(status=204)

    app = web.Application()
    app.router.add_put("/{name}", put)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"listening on http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
