package nbd

import (
	"bytes"
	"net"
	"sync"
	"sync/atomic"

	"firn.io/firn/nbd/wire"
)

// request is one request between the goroutine that read it, the workers that
// do its pieces, and the writer of its reply. The last of its pieces to end
// sends the reply.
type request struct {
	s *session
	wire.Request
	pieces  []piece
	planned int
	pending atomic.Int32
	// chunked reads send each piece as a chunk of its own.
	chunked bool

	mu        sync.Mutex
	err       error
	abandoned bool
	states    []wire.State

	head []byte
	data bool
	// charge pays for the memory of a reply that is neither small nor buffers.
	charge charge
}

// piece is the part of a request that one call of the Backend does.
type piece struct {
	req *request
	off int64
	n   int
	// buf is nil for commands without payload.
	buf *buffer
	// hole says that a chunk's bytes are all zero and do not travel.
	hole bool
	head []byte
}

var requests = sync.Pool{New: func() any { return new(request) }}

// newRequest returns a request of r with room for n pieces.
func newRequest(s *session, r wire.Request, n int) *request {
	q := requests.Get().(*request)
	q.s, q.Request = s, r
	q.chunked, q.data, q.abandoned, q.err, q.states = false, false, false, nil, nil
	if cap(q.pieces) < n {
		q.pieces = make([]piece, 0, n)
	}
	q.pieces = q.pieces[:0]
	q.planned = n
	q.pending.Store(int32(n))
	return q
}

// errorText is what a client is told of an error.
func errorText(err error) string {
	text := err.Error()
	return wire.Cut(text[:min(len(text), maxErrorText)])
}

func (q *request) to() wire.To { return q.s.to(q.Request) }

func (q *request) add(off int64, n int, buf *buffer) *piece {
	q.pieces = q.pieces[:len(q.pieces)+1]
	p := &q.pieces[len(q.pieces)-1]
	p.req, p.off, p.n, p.buf, p.hole = q, off, n, buf, false
	return p
}

// fail keeps the first error.
func (q *request) fail(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err == nil {
		q.err = err
	}
}

// run does the piece and ends it.
func (p *piece) run() {
	q, t, ctx := p.req, p.req.s.target, p.req.s.ctx
	if err := ctx.Err(); err != nil {
		// The connection is over, and what was not begun never is.
		p.end(err)
		return
	}
	off, n := int64(q.Offset), int64(q.Length)
	var f Flags
	if q.Flags&wire.FlagFUA != 0 {
		f |= FUA
	}
	var err error
	switch q.Command {
	case wire.CmdRead:
		err = t.read(ctx, p.buf.data(), p.off)
	case wire.CmdWrite:
		err = t.write(ctx, p.buf.data(), p.off, f)
		p.buf.free()
		p.buf = nil
	case wire.CmdFlush:
		err = t.flush(ctx)
	case wire.CmdTrim:
		err = t.trimmer.Trim(ctx, off, n, f)
	case wire.CmdWriteZeroes:
		if q.Flags&wire.FlagNoHole != 0 {
			f |= NoHole
		}
		if q.Flags&wire.FlagFastZero != 0 {
			f |= FastZero
		}
		err = t.writeZeroes(ctx, off, n, f)
	case wire.CmdCache:
		err = t.cacher.Cache(ctx, off, n)
	case wire.CmdBlockStatus:
		limit := maxStates
		if q.Flags&wire.FlagReqOne != 0 {
			limit = 1
		}
		q.states, err = t.states(ctx, off, n, limit)
	}
	p.end(err)
}

// end answers for the piece, and with the last piece for the request.
func (p *piece) end(err error) {
	q := p.req
	if err != nil {
		q.fail(err)
		q.s.leaveOn(err, q.Request)
	}
	if q.chunked {
		p.sendChunk(err)
	}
	q.done(1)
}

// done counts pieces that have ended; with the last the request is answered.
func (q *request) done(pieces int) {
	if q.pending.Add(-int32(pieces)) == 0 {
		q.reply()
	}
}

// sendChunk sends a piece of a chunked read, never as the last chunk.
func (p *piece) sendChunk(err error) {
	q := p.req
	switch {
	case err != nil:
		p.buf.free()
		p.buf = nil
		e := errnoOf(err, q.Command, q.Flags)
		p.head = wire.AppendErrorOffset(p.head[:0], q.to(), false, e, errorText(err), uint64(p.off))
	case allZero(p.buf.data()):
		p.buf.free()
		p.buf = nil
		p.head = wire.AppendOffsetHole(p.head[:0], q.to(), false, uint64(p.off), p.n)
	default:
		var h [headroom]byte
		p.buf.head(wire.AppendOffsetData(h[:0], q.to(), false, uint64(p.off), p.n))
	}
	q.s.out.send(p)
}

func allZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeroes))
		if !bytes.Equal(p[:n], zeroes[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

// segments, bytes and sent make a piece an outgoing chunk.
func (p *piece) segments(dst net.Buffers) net.Buffers {
	if p.buf != nil {
		return append(dst, p.buf.wire())
	}
	return append(dst, p.head)
}

func (p *piece) bytes() int {
	if p.buf != nil {
		return len(p.buf.wire())
	}
	return len(p.head)
}

func (p *piece) sent() {
	if p.buf != nil {
		p.buf.free()
		p.buf = nil
	}
}

// reply makes the reply, or a chunked read's last chunk, and sends it.
func (q *request) reply() {
	s := q.s
	structured := s.headers.Structured(q.Command)
	switch {
	case q.abandoned:
		// It still follows its chunks through the writer, which end before it.
		q.head = q.head[:0]
	case q.err != nil:
		e := errnoOf(q.err, q.Command, q.Flags)
		s.count.failed(e)
		switch {
		case q.chunked:
			q.head = wire.AppendNone(q.head[:0], q.to())
		case structured:
			q.head = wire.AppendError(q.head[:0], q.to(), e, errorText(q.err))
		default:
			q.head = wire.AppendSimpleReply(q.head[:0], q.Cookie, e)
		}
	case q.Command == wire.CmdRead:
		s.count.readBytes.Add(q.Length)
		q.replyRead()
	case q.Command == wire.CmdBlockStatus:
		q.head = wire.AppendBlockStatus(q.head[:0], q.to(), true, contextID, q.states)
	default:
		if q.Command == wire.CmdWrite {
			s.count.writtenBytes.Add(q.Length)
		}
		if structured {
			q.head = wire.AppendNone(q.head[:0], q.to())
			break
		}
		q.head = wire.AppendSimpleReply(q.head[:0], q.Cookie, 0)
	}
	s.out.send(q)
}

// replyRead: the header goes before the first piece's data.
func (q *request) replyRead() {
	if q.chunked {
		q.head = wire.AppendNone(q.head[:0], q.to())
		return
	}
	q.data, q.head = true, q.head[:0]
	var h [headroom]byte
	if q.s.headers != wire.SimpleReplies {
		q.pieces[0].buf.head(wire.AppendOffsetData(h[:0], q.to(), true, q.Offset, int(q.Length)))
	} else {
		q.pieces[0].buf.head(wire.AppendSimpleReply(h[:0], q.Cookie, 0))
	}
}

func (q *request) segments(dst net.Buffers) net.Buffers {
	if len(q.head) > 0 {
		dst = append(dst, q.head)
	}
	if !q.data {
		return dst
	}
	for i := range q.pieces {
		dst = append(dst, q.pieces[i].buf.wire())
	}
	return dst
}

func (q *request) bytes() int {
	n := len(q.head)
	if q.data {
		for i := range q.pieces {
			n += len(q.pieces[i].buf.wire())
		}
	}
	return n
}

// sent ends the request. Chunks of it were queued before it, and so have been
// sent.
func (q *request) sent() {
	for i := range q.pieces {
		q.pieces[i].sent()
	}
	s := q.s
	q.charge.release()
	q.charge = charge{}
	q.s, q.err, q.states = nil, nil, nil
	if cap(q.head) > keptHead {
		q.head = nil
	}
	requests.Put(q)
	s.gate.leave()
}
