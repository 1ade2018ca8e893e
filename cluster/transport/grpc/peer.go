package grpc

import (
	"context"
	"sync/atomic"
	"time"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
)

// peer is one end as the Loop sees it. All but queued is used on the loop.
type peer struct {
	net     *Network
	h       transport.Handler
	addr    string
	ctx     context.Context // the dialler's; nil for an accepted peer
	dialled bool

	session *session // nil while there is no connection
	out     [2][]transport.Message
	due     bool // a flush is due at the end of the turn
	closed  bool
	backoff time.Duration
	retryAt clock.Instant // Send refuses until then
	queued  atomic.Int64  // bytes that gRPC has not taken
}

// Addr implements transport.Peer.
func (p *peer) Addr() string { return p.addr }

// QueuedBytes implements transport.Peer.
func (p *peer) QueuedBytes() int { return int(p.queued.Load()) }

// Send implements transport.Peer.
func (p *peer) Send(c transport.Class, m transport.Message) bool {
	n := int64(m.Bytes())
	switch {
	case p.closed, p.ctx != nil && p.ctx.Err() != nil,
		p.session == nil && (!p.dialled || p.net.opts.Loop.Now() < p.retryAt),
		p.queued.Load()+n > transport.MaxQueueBytes,
		n > maxMessageBytes || len(m.Header) > transport.MaxHeaderBytes || len(m.Payloads) > transport.MaxPayloads:
		m.Release()
		return false
	}
	p.queued.Add(n)
	p.out[c] = append(p.out[c], m)
	if !p.due {
		p.due = true
		p.net.opts.Loop.Defer(p.flush)
	}
	return true
}

func (p *peer) flush() {
	p.due = false
	if p.closed {
		p.drop()
		return
	}
	if p.session == nil {
		p.session = newSession(p.net, p)
		p.session.dial(p.ctx)
	}
	for c, ms := range p.out {
		if len(ms) > 0 {
			p.out[c] = p.session.queue(transport.Class(c), ms)
		}
	}
}

// lost takes note, on the loop, that a session has ended.
func (p *peer) lost(s *session, err error) {
	if p.session != s || p.closed {
		return
	}
	p.session = nil
	p.drop()
	if p.dialled {
		p.backoff = min(max(2*p.backoff, minBackoff), maxBackoff)
		p.retryAt = p.net.opts.Loop.Now().Add(jitter(p.backoff, p.net.opts.Loop.Rand()))
	} else {
		p.closed = true
	}
	p.h.Closed(p, err)
}

// Close implements transport.Peer.
func (p *peer) Close() {
	if p.closed {
		return
	}
	p.closed = true
	p.drop()
	if s := p.session; s != nil {
		p.session = nil
		s.end(block.Errorf(block.Canceled, "closed by this side"))
	}
}

func (p *peer) drop() {
	for c, ms := range p.out {
		p.discard(ms)
		p.out[c] = nil
	}
}

// discard releases messages that go nowhere.
func (p *peer) discard(ms []transport.Message) {
	for i := range ms {
		p.queued.Add(-int64(ms[i].Bytes()))
		ms[i].Release()
	}
}
