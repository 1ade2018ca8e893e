package grpc

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/block"
)

// session is one connection of a peer: up to two streams, which end together.
// The loop queues batches; a writer per stream packs them into frames, a reader
// per stream posts what arrives, a bounded number of frames ahead of the loop.
type session struct {
	net  *Network
	peer *peer
	id   string

	ctx    context.Context
	cancel context.CancelFunc
	gone   func() // of an accepted session: forgets it

	mu struct {
		sync.Mutex
		ended bool
		links [2]link
	}
}

// link is what waits for one stream. Guarded by session.mu.
type link struct {
	started bool // somebody writes, or is about to
	waiting []transport.Message
	wake    chan struct{} // capacity 1: waiting has grown
}

// framesAhead is how many frames of a stream the loop may lag behind.
const framesAhead = 8

func newSession(n *Network, p *peer) *session {
	s := &session{net: n, peer: p}
	for c := range s.mu.links {
		s.mu.links[c].wake = make(chan struct{}, 1)
	}
	return s
}

// dial starts the data stream. The control stream follows when it is needed.
func (s *session) dial(ctx context.Context) {
	s.id = rand.Text()
	s.ctx, s.cancel = context.WithCancel(ctx)
	s.mu.links[transport.Data].started = true
	go s.runDialled(transport.Data)
}

// queue hands messages to the writer of class c; it returns the slice to gather
// the next ones in.
func (s *session) queue(c transport.Class, ms []transport.Message) []transport.Message {
	s.mu.Lock()
	if s.mu.ended {
		s.mu.Unlock()
		s.peer.discard(ms)
		return nil
	}
	l := &s.mu.links[c]
	if !l.started && !s.peer.dialled {
		// The dialler has not opened this stream: use the one it has.
		c = transport.Data + transport.Control - c
		l = &s.mu.links[c]
	}
	start := !l.started
	l.started = true
	spare := ms[:0]
	if len(l.waiting) == 0 {
		l.waiting, spare = ms, l.waiting[:0]
	} else {
		l.waiting = append(l.waiting, ms...)
		clear(ms)
	}
	s.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
	if start {
		go s.runDialled(c)
	}
	return spare
}

// runDialled owns one stream of a dialled session until it ends.
func (s *session) runDialled(c transport.Class) {
	cc, st, err := s.net.connect(s.ctx, s.peer.addr, s.id, c)
	if err != nil {
		s.end(translate(err))
		return
	}
	defer cc.Close()
	hello := transport.Message{Type: transport.TypeHello, Header: transport.AppendHello(nil, s.net.opts.Identity.Hello)}
	err = st.SendMsg(&frame{messages: []transport.Message{hello}})
	read := make(chan struct{}) // closed when the reader has ended
	go func() {
		defer close(read)
		// The server's header says that it took the hello.
		if _, err := st.Header(); err == nil && c == transport.Data {
			s.net.opts.Loop.Post(func() { s.peer.backoff = 0 })
		}
		s.end(translate(s.read(st)))
	}()
	if err == nil {
		err = s.write(c, st)
	}
	// io.EOF says only that the stream has ended: the reader learns why.
	if err != nil && !errors.Is(err, io.EOF) {
		s.end(translate(err))
	}
	<-read
}

type stream interface {
	SendMsg(any) error
	RecvMsg(any) error
}

// write sends what is queued until the session ends.
func (s *session) write(c transport.Class, st stream) error {
	l := &s.mu.links[c]
	var batch []transport.Message
	for {
		s.mu.Lock()
		batch, l.waiting = l.waiting, batch[:0]
		ended := s.mu.ended
		s.mu.Unlock()
		if ended {
			s.peer.discard(batch)
			return nil
		}
		if len(batch) == 0 {
			select {
			case <-l.wake:
				continue
			case <-s.ctx.Done():
				return nil
			}
		}
		for rest := batch; len(rest) > 0; {
			n, bytes := pack(rest)
			err := st.SendMsg(&frame{messages: rest[:n]})
			s.peer.queued.Add(-int64(bytes))
			rest = rest[n:]
			if err != nil {
				s.peer.discard(rest)
				return err
			}
		}
		clear(batch)
	}
}

// pack counts how many messages make the next frame, and their bytes.
func pack(ms []transport.Message) (n, bytes int) {
	size, payloads := 0, 0
	for n < len(ms) && n < maxMessages {
		b := ms[n].Bytes()
		size += b + rowBytes + 4*len(ms[n].Payloads)
		payloads += len(ms[n].Payloads)
		if n > 0 && (size > transport.MaxFrameBytes || payloads > maxPayloads) {
			break
		}
		bytes += b
		n++
	}
	return n, bytes
}

// read posts what arrives until the stream ends.
func (s *session) read(st stream) error {
	ahead := make(chan struct{}, framesAhead) // one token per frame that the loop has not taken
	for {
		f := &frame{}
		if err := st.RecvMsg(f); err != nil {
			return err
		}
		select {
		case ahead <- struct{}{}:
		case <-s.ctx.Done():
			release(f.messages)
			return s.ctx.Err()
		}
		s.net.opts.Loop.Post(func() {
			<-ahead
			for i := range f.messages {
				if p := s.peer; p.closed || p.session != s || f.messages[i].Type == transport.TypeHello {
					f.messages[i].Release()
				} else {
					p.h.Receive(p, f.messages[i])
				}
			}
		})
	}
}

func release(ms []transport.Message) {
	for i := range ms {
		ms[i].Release()
	}
}

// end closes the session, once, and tells the loop.
func (s *session) end(err error) {
	s.mu.Lock()
	if s.mu.ended {
		s.mu.Unlock()
		return
	}
	s.mu.ended = true
	var left []transport.Message
	for c := range s.mu.links {
		left = append(left, s.mu.links[c].waiting...)
		s.mu.links[c].waiting = nil
	}
	s.mu.Unlock()
	s.cancel()
	s.peer.discard(left)
	if s.gone != nil {
		s.gone()
	}
	s.net.opts.Loop.Post(func() { s.peer.lost(s, err) })
}

// translate gives an error of gRPC a kind.
func translate(err error) error {
	switch status.Code(err) {
	case codes.PermissionDenied, codes.Unauthenticated:
		return block.Errorf(block.Denied, "%s", status.Convert(err).Message())
	case codes.Unimplemented:
		return block.Wrap(block.Unsupported, err, "the other side does not speak Firn's protocol")
	}
	if errors.Is(err, io.EOF) {
		return block.Errorf(block.Unavailable, "the other side closed the connection")
	}
	return block.Wrap(block.Unavailable, err, "connection lost")
}

// server accepts the sessions of one listener.
type server struct {
	net *Network
	h   transport.Handler

	mu       sync.Mutex
	stopped  bool
	sessions map[string]*session
}

// serve owns one stream of an accepted session.
func (v *server) serve(c transport.Class, st grpc.ServerStream) error {
	f, err := v.hello(st)
	if err != nil {
		return err
	}
	defer release(f.messages)
	if len(f.messages) != 1 || f.messages[0].Type != transport.TypeHello {
		return status.Error(codes.InvalidArgument, "a connection starts with a hello")
	}
	hello, err := transport.DecodeHello(f.messages[0].Header)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	md, _ := metadata.FromIncomingContext(st.Context())
	id := md.Get(sessionKey)
	if len(id) != 1 || len(id[0]) > 64 {
		return status.Error(codes.InvalidArgument, "a connection without a session")
	}
	checked := make(chan error, 1) // the loop's verdict
	v.net.opts.Loop.Post(func() { checked <- v.net.opts.Identity.Check(hello) })
	select {
	case err = <-checked:
	case <-st.Context().Done():
		return st.Context().Err()
	}
	if err != nil {
		return status.Error(codes.PermissionDenied, err.Error())
	}
	s := v.session(id[0], c, st, hello)
	if s == nil {
		return status.Error(codes.Unavailable, "shutting down, or the session is over, or there are too many")
	}
	if err := st.SendHeader(metadata.MD{}); err != nil {
		s.end(translate(err))
		return err
	}
	done := make(chan struct{}) // closed when the writer has ended
	go func() {
		defer close(done)
		if err := s.write(c, st); err != nil {
			s.end(translate(err))
		}
	}()
	read := make(chan error, 1) // the reader ends after this handler: RecvMsg ends with the stream
	go func() { read <- s.read(st) }()
	select {
	case err = <-read:
		s.end(translate(err))
	case <-s.ctx.Done():
		err = status.Error(codes.Unavailable, "connection closed")
	}
	<-done
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return err
}

// hello reads the first frame of a stream, which has to come soon: what has not
// said who it is holds a stream of the connection's few.
func (v *server) hello(st grpc.ServerStream) (frame, error) {
	var f frame
	read := make(chan error, 1) // the reader ends after this handler: RecvMsg ends with the stream
	go func() { read <- st.RecvMsg(&f) }()
	timer := time.NewTimer(v.net.helloTime)
	defer timer.Stop()
	select {
	case err := <-read:
		return f, err
	case <-timer.C:
		return frame{}, status.Errorf(codes.DeadlineExceeded, "no hello within %v", v.net.helloTime)
	}
}

// session finds or makes the session of a stream; nil if it is over, or there
// are too many.
func (v *server) session(id string, c transport.Class, st grpc.ServerStream, hello transport.Hello) *session {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := v.sessions[id]
	if v.stopped {
		return nil
	}
	if s == nil && len(v.sessions) == maxSessions {
		return nil
	}
	if s == nil {
		addr := "unknown"
		if p, ok := grpcpeer.FromContext(st.Context()); ok {
			addr = p.Addr.String()
		}
		p := &peer{net: v.net, h: v.h, addr: addr}
		s = newSession(v.net, p)
		s.id = id
		// The two streams' contexts end with their connections, each of which ends the session.
		s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(st.Context()))
		s.gone = func() {
			v.mu.Lock()
			delete(v.sessions, id)
			v.mu.Unlock()
		}
		v.sessions[id] = s
		m := transport.Message{Type: transport.TypeHello, Header: transport.AppendHello(nil, hello)}
		v.net.opts.Loop.Post(func() {
			p.session = s
			p.h.Receive(p, m)
		})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.ended || s.mu.links[c].started {
		return nil
	}
	s.mu.links[c].started = true
	return s
}

// stop ends all sessions and lets in no more.
func (v *server) stop() {
	v.mu.Lock()
	v.stopped = true
	var all []*session
	for _, s := range v.sessions {
		all = append(all, s)
	}
	v.mu.Unlock()
	for _, s := range all {
		s.end(block.Errorf(block.Unavailable, "this side stopped listening"))
	}
}
