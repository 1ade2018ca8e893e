package nbd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"firn.io/firn/nbd/wire"
)

// contextID is what base:allocation is called on the wire.
const contextID = 1

// session is a connection in the transmission phase.
//
// One goroutine reads it and answers from lent memory by itself; it gathers
// those replies in a batch and writes the batch before it would wait for
// anything. All else goes to at most Options.Workers goroutines, whose replies
// the combining writer sends in the order in which they end.
type session struct {
	ctx    context.Context
	cancel context.CancelFunc // of ctx
	// resumes: the client said which session it belongs to, and comes back.
	resumes bool
	target  *target
	headers wire.Headers
	mapped  bool

	in    *input
	out   *replies
	batch *batch
	bytes *allowance
	count *counters
	gate  gate
	watch watch

	jobs       chan *piece
	workers    int
	maxWorkers int
	// calling is set while the reading goroutine is inside the Backend.
	calling bool
}

// gate counts the requests in flight, and once shut lets none in.
type gate struct {
	mu   sync.Mutex
	in   int
	shut atomic.Bool
	// limit is how many may be in; room gets a value when the one goroutine
	// that enters waits for there to be fewer.
	limit   int
	waiting bool
	room    chan struct{}
	// empty is closed once the gate is shut and all have left.
	empty chan struct{}
}

func newGate(limit int) gate {
	return gate{limit: limit, room: make(chan struct{}, 1), empty: make(chan struct{})}
}

// enter tells whether the request is in, or else whether the gate is full; then
// room tells when to try again.
func (g *gate) enter() (in, full bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.shut.Load():
		return false, false
	case g.in >= g.limit:
		g.waiting = true
		return false, true
	}
	g.in++
	return true, false
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.in--
	if g.waiting {
		g.waiting = false
		g.room <- struct{}{}
	}
	if g.shut.Load() && g.in == 0 {
		close(g.empty)
	}
}

// close shuts the gate and returns what tells that all have left.
func (g *gate) close() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.shut.Load() {
		g.shut.Store(true)
		if g.in == 0 {
			close(g.empty)
		}
	}
	return g.empty
}

var (
	// errDisconnect ends a session as the client asked.
	errDisconnect = errors.New("client disconnected")
	// errMoved ends the session of a client that comes back: what it waits for is
	// answered elsewhere, or here on another connection.
	errMoved = errors.New("the export is not served on this connection any more; its client sends what is unanswered again")
)

// serve reads requests until the client leaves by NBD_CMD_DISC (nil), closes
// the connection between two requests (io.EOF), or must be left.
func (s *session) serve() (err error) {
	defer protect(&s.calling, &err)
	for {
		n := s.headers.RequestLen()
		head, err := s.in.peek(n)
		if err != nil {
			return err
		}
		r, err := wire.ParseRequest(head, s.headers)
		if err != nil {
			return err
		}
		s.in.discard(n)
		s.count.request(r.Command)
		if s.out.broken.Load() && onlyAnswers(r.Command) && !s.hasPayload(r) {
			continue // nobody is there any more for what is left in the buffer
		}
		if err := s.handle(r); err != nil {
			if err == errDisconnect {
				return nil
			}
			return err
		}
	}
}

// leaveOn ends the connection, without an answer to r, if the error says that it
// is over while another may work and the client is one that comes back: it sends
// r again then. An answer would reach the applications on its device.
func (s *session) leaveOn(err error, r wire.Request) {
	if s.resumes && errnoOf(err, r.Command, r.Flags) == wire.ESHUTDOWN {
		s.out.hangUp(cmp.Or(s.ctx.Err(), errMoved))
	}
}

// onlyAnswers tells whether a command does nothing but bring an answer. What
// changes the export is carried out for a client that did not wait, too.
func onlyAnswers(c wire.Command) bool {
	return c == wire.CmdRead || c == wire.CmdBlockStatus || c == wire.CmdCache
}

// handle takes one request. An error ends the connection.
func (s *session) handle(r wire.Request) error {
	if r.Command == wire.CmdDisc {
		return errDisconnect
	}
	if r.Flags&wire.FlagPayloadLen != 0 && r.Command != wire.CmdWrite && s.hasPayload(r) {
		known, err := s.statusPayload(&r)
		if err != nil {
			return err
		}
		if !known {
			return s.refuse(r, wire.EINVAL, "a payload that the command does not take")
		}
	}
	if e, text := s.check(r); e != 0 {
		if err := s.skipPayload(r); err != nil {
			return err
		}
		return s.refuse(r, e, text)
	}
	if r.Command == wire.CmdRead && !s.gate.shut.Load() && s.lend(r) {
		return nil
	}
	if in, err := s.enter(); err != nil {
		return err
	} else if !in {
		if s.resumes {
			// It sends this, and what follows, again: to whoever serves it next. An
			// error would reach the applications on its device.
			return errDisconnect
		}
		if err := s.skipPayload(r); err != nil {
			return err
		}
		return s.refuse(r, wire.ESHUTDOWN, "the server is shutting down")
	}
	switch {
	case r.Length == 0 && r.Command != wire.CmdFlush:
		return s.answerEmpty(r)
	case r.Command == wire.CmdRead:
		return s.read(r)
	case r.Command == wire.CmdWrite:
		return s.write(r)
	}
	q := newRequest(s, r, 1)
	if r.Command == wire.CmdBlockStatus {
		var err error
		if q.charge, err = s.take(statusBytes); err != nil {
			return s.abandon(q, err)
		}
	}
	return s.dispatch(q.add(int64(r.Offset), 0, nil))
}

// enter goes through the gate. While it is full it waits; before that it writes
// what is ready.
func (s *session) enter() (in bool, err error) {
	in, full := s.gate.enter()
	if !full {
		return in, nil
	}
	if err := s.flush(); err != nil {
		return false, err
	}
	s.watch.reset()
	defer s.watch.stop()
	for {
		select {
		case <-s.gate.room:
			if in, full = s.gate.enter(); !full {
				return in, nil
			}
		case <-s.ctx.Done():
			return false, s.ctx.Err()
		case <-s.watch.tick():
			if s.watch.left() {
				s.cancel()
			}
		}
	}
}

// hasPayload tells whether Length bytes of payload follow r. A write has them
// also if a client forgets to say so.
func (s *session) hasPayload(r wire.Request) bool {
	return r.Command == wire.CmdWrite || s.headers == wire.ExtendedHeaders && r.Flags&wire.FlagPayloadLen != 0
}

// skipPayload drops what belongs to a request that is refused.
func (s *session) skipPayload(r wire.Request) error {
	switch {
	case !s.hasPayload(r):
		return nil
	case r.Length > maxSkipPayload:
		return fmt.Errorf("%w: %s with %d bytes of payload", wire.ErrMalformed, r.Command, r.Length)
	}
	return s.in.skip(int(r.Length))
}

// statusPayload reads the payload of a BLOCK_STATUS that names the contexts it
// asks for, and makes r one that asks for them. It drops any other payload.
func (s *session) statusPayload(r *wire.Request) (known bool, err error) {
	if r.Command != wire.CmdBlockStatus || r.Length > maxStatusPayload {
		return false, s.skipPayload(*r)
	}
	var space [maxStatusPayload]byte
	p := space[:r.Length]
	if err := s.in.full(p); err != nil {
		return false, err
	}
	length, contexts, err := wire.ParseStatusPayload(p)
	if err != nil || len(contexts) != 1 || contexts[0] != contextID {
		return false, nil
	}
	r.Length, r.Flags = length, r.Flags&^wire.FlagPayloadLen
	return true, nil
}

// check refuses what the Backend must not see.
func (s *session) check(r wire.Request) (wire.Errno, string) {
	t := s.target
	changes := r.Command == wire.CmdWrite || r.Command == wire.CmdTrim || r.Command == wire.CmdWriteZeroes
	switch {
	case !s.offers(r.Command):
		return wire.EINVAL, "unknown command"
	case r.Flags&^s.headers.AllowedFlags(r.Command) != 0:
		return wire.EINVAL, "flags that the command does not take"
	case r.Command == wire.CmdFlush:
		if r.Offset != 0 || r.Length != 0 {
			return wire.EINVAL, "a flush has no offset and no length"
		}
		return 0, ""
	case changes && t.readOnly:
		return wire.EPERM, "the export is read-only"
	case (r.Command == wire.CmdRead || r.Command == wire.CmdWrite) && r.Length > wire.MaxPayload:
		return wire.EINVAL, "more than 32 MiB in one request"
	case r.Command == wire.CmdBlockStatus && r.Length == 0:
		return wire.EINVAL, "status of no bytes"
	case !s.covers(r.Offset, r.Length):
		if changes && r.Command != wire.CmdTrim {
			return wire.ENOSPC, "beyond the end of the export"
		}
		return wire.EINVAL, "beyond the end of the export"
	}
	return 0, ""
}

func (s *session) covers(off, n uint64) bool {
	s.calling = true
	ok := s.target.covers(off, n)
	s.calling = false
	return ok
}

// offers tells whether the export has the command.
func (s *session) offers(c wire.Command) bool {
	t := s.target
	switch c {
	case wire.CmdRead, wire.CmdWrite, wire.CmdFlush, wire.CmdWriteZeroes:
		return true
	case wire.CmdTrim:
		return t.offers&OfferTrim != 0
	case wire.CmdCache:
		return t.offers&OfferCache != 0
	case wire.CmdBlockStatus:
		return s.mapped && t.offers&OfferMap != 0
	}
	return false
}

// to is the answer's address.
func (s *session) to(r wire.Request) wire.To {
	return wire.To{Cookie: r.Cookie, Offset: r.Offset, Headers: s.headers}
}

// refuse answers without having entered the gate.
func (s *session) refuse(r wire.Request, e wire.Errno, text string) error {
	s.count.failed(e)
	if err := s.room(wire.ExtChunkHeaderLen + 6 + len(text)); err != nil {
		return err
	}
	if s.headers.Structured(r.Command) {
		s.batch.setHead(wire.AppendError(s.batch.head(), s.to(r), e, text))
	} else {
		s.batch.setHead(wire.AppendSimpleReply(s.batch.head(), r.Cookie, e))
	}
	return nil
}

// answerEmpty: a request for no bytes succeeds.
func (s *session) answerEmpty(r wire.Request) error {
	defer s.gate.leave()
	if err := s.room(wire.ExtChunkHeaderLen); err != nil {
		return err
	}
	if s.headers.Structured(r.Command) {
		s.batch.setHead(wire.AppendNone(s.batch.head(), s.to(r)))
	} else {
		s.batch.setHead(wire.AppendSimpleReply(s.batch.head(), r.Cookie, 0))
	}
	return nil
}

// lend answers a read from memory, if memory has it.
func (s *session) lend(r wire.Request) bool {
	n := int(r.Length)
	if s.target.lender == nil || n == 0 || n > batchBytes-headroom || !s.batch.fits(headroom+n) && s.flush() != nil {
		return false
	}
	s.calling = true
	loan, ok := s.target.lender.Lend(int64(r.Offset), n)
	s.calling = false
	if !ok {
		return false
	}
	if s.headers != wire.SimpleReplies {
		s.batch.setHead(wire.AppendOffsetData(s.batch.head(), s.to(r), true, r.Offset, n))
	} else {
		s.batch.setHead(wire.AppendSimpleReply(s.batch.head(), r.Cookie, 0))
	}
	s.batch.lend(loan)
	s.count.memoryRead.Add(1)
	s.count.readBytes.Add(uint64(n))
	return true
}

// split returns the length of the piece that starts at off with n bytes left:
// pieces end at multiples of the Backend's maximum.
func (s *session) split(off int64, n int) int {
	return min(n, s.target.piece-int(off%int64(s.target.piece)))
}

func (s *session) countPieces(off int64, n int) (pieces int) {
	for n > 0 {
		k := s.split(off, n)
		off, n, pieces = off+int64(k), n-k, pieces+1
	}
	return pieces
}

// read sends a read to the workers. If it may be answered in chunks, each piece
// takes its memory when there is some; otherwise all must be in hand before the
// reply begins, and the memory is taken at once so that two reads cannot wait
// for each other's.
func (s *session) read(r wire.Request) error {
	off, n := int64(r.Offset), int(r.Length)
	q := newRequest(s, r, s.countPieces(off, n))
	q.chunked = q.planned > 1 && s.headers != wire.SimpleReplies && r.Flags&wire.FlagDF == 0
	var all charge
	if !q.chunked {
		var cost int64
		for o, left := off, n; left > 0; {
			k := s.split(o, left)
			cost, o, left = cost+bufferCost(k), o+int64(k), left-k
		}
		var err error
		if all, err = s.take(cost); err != nil {
			return s.abandon(q, err)
		}
	}
	for n > 0 {
		k := s.split(off, n)
		c := all
		if q.chunked {
			var err error
			if c, err = s.take(bufferCost(k)); err != nil {
				return s.abandon(q, err)
			}
		} else {
			c = all.split(bufferCost(k))
		}
		left := q.planned - len(q.pieces) - 1
		if err := s.dispatch(q.add(off, k, newBuffer(k, c))); err != nil {
			all.release()
			return s.abandonLeft(q, left, err)
		}
		off, n = off+int64(k), n-k
	}
	return nil
}

// write reads the payload piece by piece and sends each to the workers while
// the next arrives.
func (s *session) write(r wire.Request) error {
	off, n := int64(r.Offset), int(r.Length)
	q := newRequest(s, r, s.countPieces(off, n))
	for n > 0 {
		k := s.split(off, n)
		c, err := s.take(bufferCost(k))
		if err != nil {
			return s.abandon(q, err)
		}
		buf := newBuffer(k, c)
		if err := s.in.full(buf.data()); err != nil {
			buf.free()
			return s.abandon(q, err)
		}
		left := q.planned - len(q.pieces) - 1
		if err := s.dispatch(q.add(off, k, buf)); err != nil {
			return s.abandonLeft(q, left, err)
		}
		off, n = off+int64(k), n-k
	}
	return nil
}

// abandon gives up the pieces that q will never get, because its connection is
// over; the last of the others ends it, without an answer.
func (s *session) abandon(q *request, err error) error {
	return s.abandonLeft(q, q.planned-len(q.pieces), err)
}

// abandonLeft is abandon after a piece was dispatched: if none is left, q is not
// the caller's any more.
func (s *session) abandonLeft(q *request, left int, err error) error {
	if left > 0 {
		q.mu.Lock()
		q.abandoned = true
		q.mu.Unlock()
		q.done(left)
	}
	return err
}

// take pays for n bytes of payload. Before it waits it writes what is ready.
func (s *session) take(n int64) (charge, error) {
	if c, ok := s.bytes.try(n); ok {
		return c, nil
	}
	if err := s.flush(); err != nil {
		return charge{}, err
	}
	w, got := s.bytes.begin(n)
	if w == nil {
		return got, nil
	}
	s.watch.reset()
	defer s.watch.stop()
	for {
		select {
		case <-w.ready:
			return charge{s.bytes, n}, nil
		case <-s.ctx.Done():
			return s.bytes.giveUp(w, s.ctx.Err())
		case <-s.watch.tick():
			if s.watch.left() {
				s.cancel()
			}
		}
	}
}

// dispatch gives a piece to a worker, and starts one if none is idle.
func (s *session) dispatch(p *piece) error {
	select {
	case s.jobs <- p:
		return nil
	default:
	}
	if s.workers < s.maxWorkers {
		s.workers++
		go s.work(p)
		return nil
	}
	err := s.flush()
	s.watch.reset()
	for {
		select {
		case s.jobs <- p:
			s.watch.stop()
			return cmp.Or(err, s.ctx.Err())
		case <-s.watch.tick():
			if s.watch.left() {
				s.cancel()
			}
		}
	}
}

// work does p and then what dispatch brings until the session ends.
func (s *session) work(p *piece) {
	for ok := true; ok; p, ok = <-s.jobs {
		p.run()
	}
}

// room makes room for n bytes in the batch.
func (s *session) room(n int) error {
	if s.batch.fits(n) {
		return nil
	}
	return s.flush()
}

// flush writes the batch.
func (s *session) flush() error {
	if s.batch.n == 0 {
		return nil
	}
	return s.out.sendAndWait(s.batch)
}

// finish waits until the requests in flight have ended and their replies are
// written or cannot be. The reading goroutine calls it last.
func (s *session) finish() error {
	err := s.flush()
	empty := s.gate.close()
	s.watch.reset()
	defer s.watch.stop()
	for {
		select {
		case <-empty:
			close(s.jobs)
			return err
		case <-s.watch.tick():
			if s.watch.left() {
				s.cancel()
			}
		}
	}
}
