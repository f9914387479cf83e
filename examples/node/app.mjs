// A web application with a page for each video. It counts the views of a page, and shows the number.

import { createServer } from "node:http";
import { createClient } from "redis";

const { REDIS_URL = "redis://localhost:6379", WORKER_URL = "http://localhost:3003", PORT = "8000" } = process.env;
const VIDEOS = new Map([["vod_1", "My first video"], ["vod_2", "My second video"]]);
const PERIOD_MS = 1000;

const redis = createClient({
  url: REDIS_URL,
  disableOfflineQueue: true, // while Redis is away, fail instead of queueing
  commandsQueueMaxLength: 1000, // commands without an answer
  pingInterval: 1000,
  socket: {
    connectTimeout: 500,
    socketTimeout: 5000, // a Redis that answers nothing, not even PING
    reconnectStrategy: (retries) => Math.min(100 * 2 ** retries, 2000),
  },
});
redis.on("error", (error) => console.error(`redis: ${error.message || error.code}`));
redis.connect().catch(() => {}); // pages do not wait for it; the handler above logs why it fails

// In the background: no page waits for Redis or fails with it. Never repeated, since a view might then count twice.
function recordView(vodId) {
  if (!redis.isReady) return; // the handler above logs why
  redis
    .multi()
    .incr(`vod:views:${vodId}`)
    .publish("view_count_updates", JSON.stringify({ vodId, count: 1 }))
    .execAsPipeline()
    .catch((error) => console.error(`a view of ${vodId} may not be counted: ${error.message}`));
}

// The number to show, at most a second old while the worker answers; undefined before its first answer.
const numbers = new Map();
const askedAt = new Map();
async function viewsOf(vodId) {
  const now = performance.now();
  if (now - (askedAt.get(vodId) ?? -Infinity) >= PERIOD_MS) {
    askedAt.set(vodId, now); // also for requests that arrive while this one asks
    try {
      const response = await fetch(`${WORKER_URL}/v1/views/${vodId}`, { signal: AbortSignal.timeout(500) });
      if (!response.ok) throw new Error(`status ${response.status}`);
      numbers.set(vodId, (await response.json()).views);
    } catch (error) {
      console.error(`the number of views is not up to date: ${error.message}`);
    }
  }
  return numbers.get(vodId);
}

const server = createServer(async (request, response) => {
  const [, vodId] = request.url.match(/^\/watch\/(\w+)$/) ?? [];
  if (request.method !== "GET" || !VIDEOS.has(vodId)) { // otherwise any visitor could add ids to the database
    response.writeHead(404).end();
    return;
  }
  recordView(vodId);
  const number = await viewsOf(vodId);
  const shown = number === undefined ? "" : `<p>${number} views</p>`;
  response.setHeader("Content-Type", "text/html; charset=utf-8");
  response.end(`<!doctype html><h1>${VIDEOS.get(vodId)}</h1>${shown}\n`);
});
server.listen(Number(PORT), "127.0.0.1", () => console.log(`listening on http://127.0.0.1:${PORT}`));

function stop() {
  server.close(() => (redis.isReady ? redis.close() : redis.destroy())); // close() waits for commands that were sent
}
process.once("SIGTERM", stop);
process.once("SIGINT", stop);
