package nbd

import (
	"crypto/tls"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// outgoing is something to be written to a connection in one piece.
type outgoing interface {
	// segments appends the memory to write to dst.
	segments(dst net.Buffers) net.Buffers
	// bytes is their length.
	bytes() int
	// sent is called once when they were written or never will be.
	sent()
}

// replies is the combining writer of a connection: whoever finds it idle
// becomes the writer and goes on until the queue is empty; the others only
// append. So replies that are ready together leave in one system call.
type replies struct {
	nc    net.Conn
	now   func() time.Time
	stall time.Duration

	mu      sync.Mutex
	moved   sync.Cond
	queue   []outgoing
	writing bool
	err     error
	// broken is set once err is: for the reader, which looks at it often.
	broken atomic.Bool
	// queued and done count what was given to the writer and what it is done
	// with; done moves in order.
	queued, done uint64

	// The rest belongs to the current writer.
	batch    []outgoing
	vec      net.Buffers
	space    net.Buffers
	deadline time.Time
	// gathered, for TLS, is where segments become one write: a record each
	// would cost more than copying them.
	gathered []byte
}

func newReplies(nc net.Conn, now func() time.Time, stall time.Duration) *replies {
	w := &replies{nc: nc, now: now, stall: stall}
	w.moved.L = &w.mu
	if _, ok := nc.(*tls.Conn); ok {
		w.gathered = make([]byte, 0, gatherBytes)
	}
	return w
}

// send queues o, or writes it and what others queue meanwhile.
func (w *replies) send(o outgoing) {
	w.mu.Lock()
	w.enqueue(o)
}

// sendAndWait is send for the goroutine that reads the connection: it returns
// when o was written, so that what it makes stays bounded.
func (w *replies) sendAndWait(o outgoing) error {
	w.mu.Lock()
	ticket := w.queued + 1
	w.enqueue(o)
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.done < ticket {
		w.moved.Wait()
	}
	return w.err
}

// enqueue is called with w.mu held and gives it up.
func (w *replies) enqueue(o outgoing) {
	w.queue = append(w.queue, o)
	w.queued++
	if w.writing {
		w.mu.Unlock()
		return
	}
	w.writing = true
	for len(w.queue) > 0 {
		w.queue, w.batch = w.batch[:0], w.queue
		failed := w.err != nil
		w.mu.Unlock()
		var err error
		if !failed {
			err = w.write()
		}
		for i, o := range w.batch {
			o.sent()
			w.batch[i] = nil
		}
		if err != nil {
			w.hangUp(err)
		}
		w.mu.Lock()
		w.done += uint64(len(w.batch))
		w.moved.Broadcast()
	}
	w.writing = false
	w.mu.Unlock()
}

// hangUp closes the connection: what is not written yet never is, and the reader
// notices. The first reason counts.
func (w *replies) hangUp(why error) {
	w.mu.Lock()
	first := w.err == nil
	if first {
		w.err = why
		w.broken.Store(true)
	}
	w.mu.Unlock()
	if first {
		w.nc.Close()
	}
}

// reason is why the connection was hung up, or nil.
func (w *replies) reason() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// write writes w.batch in steps of about 1 MiB, each within the stall time.
func (w *replies) write() error {
	for rest := w.batch; len(rest) > 0; {
		w.vec = w.space[:0]
		n := 0
		for len(rest) > 0 && (n == 0 || n+rest[0].bytes() <= maxQueuedBytes) {
			n += rest[0].bytes()
			w.vec = rest[0].segments(w.vec)
			rest = rest[1:]
		}
		w.space = w.vec
		if n == 0 {
			continue
		}
		// Moving the deadline costs more than looking at the time.
		if now := w.now(); w.deadline.Sub(now) < w.stall/2 {
			w.deadline = now.Add(w.stall)
			if err := w.nc.SetWriteDeadline(w.deadline); err != nil {
				return err
			}
		}
		if w.gathered != nil {
			if err := w.gather(); err != nil {
				return err
			}
			continue
		}
		if len(w.vec) == 1 {
			if _, err := w.nc.Write(w.vec[0]); err != nil {
				return err
			}
			continue
		}
		if _, err := w.vec.WriteTo(w.nc); err != nil {
			return err
		}
	}
	return nil
}

// gather writes w.vec in as few writes as its memory allows.
func (w *replies) gather() error {
	flush := func() error {
		if len(w.gathered) == 0 {
			return nil
		}
		_, err := w.nc.Write(w.gathered)
		w.gathered = w.gathered[:0]
		return err
	}
	for _, p := range w.vec {
		if len(w.gathered)+len(p) > cap(w.gathered) {
			if err := flush(); err != nil {
				return err
			}
		}
		if len(p) >= cap(w.gathered) {
			if _, err := w.nc.Write(p); err != nil {
				return err
			}
			continue
		}
		w.gathered = append(w.gathered, p...)
	}
	return flush()
}

// batch gathers the replies that the goroutine reading the connection makes.
// Small ones are copied one behind the other, large loans are written from
// where they are.
type batch struct {
	buf   []byte
	from  int
	segs  net.Buffers
	loans []Loan
	n     int
}

func newBatch() *batch { return &batch{buf: make([]byte, 0, batchCopied)} }

// fits tells whether a reply of n bytes may be added before the next flush.
func (b *batch) fits(n int) bool {
	return len(b.buf)+min(n, headroom+copyBelow) <= cap(b.buf) && b.n+n <= batchBytes && len(b.loans) < maxBatchLoans
}

// head returns where to append a header; the result goes to setHead.
func (b *batch) head() []byte { return b.buf }

func (b *batch) setHead(buf []byte) {
	b.n += len(buf) - len(b.buf)
	b.buf = buf
}

// lend adds a loan's bytes and takes it over.
func (b *batch) lend(l Loan) {
	p := l.Bytes()
	b.n += len(p)
	if len(p) < copyBelow {
		b.buf = append(b.buf, p...)
		l.Release()
		return
	}
	b.seal()
	b.segs = append(b.segs, p)
	b.loans = append(b.loans, l)
}

// seal closes the run of copied bytes.
func (b *batch) seal() {
	if len(b.buf) > b.from {
		b.segs = append(b.segs, b.buf[b.from:])
		b.from = len(b.buf)
	}
}

func (b *batch) segments(dst net.Buffers) net.Buffers {
	b.seal()
	return append(dst, b.segs...)
}

func (b *batch) bytes() int { return b.n }

func (b *batch) sent() {
	for i, l := range b.loans {
		l.Release()
		b.loans[i] = nil
	}
	clear(b.segs)
	b.buf, b.from, b.segs, b.loans, b.n = b.buf[:0], 0, b.segs[:0], b.loans[:0], 0
}
