package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"firn.io/firn/nbd/wire"
)

// ErrServerClosed is returned by Serve after Shutdown or Close.
var ErrServerClosed = errors.New("nbd: server closed")

// Server serves Exports to any number of connections.
type Server struct {
	exports Exports
	opt     Options
	bytes   *budget
	// life ends with Close, or when Shutdown gives up.
	life context.Context
	kill context.CancelFunc

	mu        sync.Mutex
	closing   bool
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	stats     Stats
	over      sync.WaitGroup

	sessions sessions
}

// conn is one connection from accept to close.
type conn struct {
	s *Server
	// nc is what the protocol is spoken over: raw, or TLS over it.
	raw, nc net.Conn
	in      *input
	count   counters
	cancel  context.CancelFunc
	// calling is set while the handshake is inside Exports.
	calling bool

	// over is closed when all of the connection has ended but its memory.
	over chan struct{}

	mu sync.Mutex
	// client and export change during the handshake.
	client Client
	export Info
	// session is set in the transmission phase.
	session *session
	drain   bool
}

// NewServer returns a server of exports that listens nowhere yet.
func NewServer(exports Exports, opt Options) *Server {
	opt = opt.withDefaults()
	s := &Server{
		exports:   exports,
		opt:       opt,
		bytes:     newBudget(opt.TotalBytes),
		listeners: map[net.Listener]struct{}{},
		conns:     map[*conn]struct{}{},
	}
	s.life, s.kill = context.WithCancel(context.Background())
	return s
}

// Serve accepts connections on l until Shutdown or Close, and then returns
// ErrServerClosed; l is closed on return. It may be called for several
// listeners.
func (s *Server) Serve(l net.Listener) error {
	defer l.Close()
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return ErrServerClosed
	}
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.listeners, l)
	}()
	for pause := 5 * time.Millisecond; ; {
		nc, err := l.Accept()
		if err == nil {
			pause = 5 * time.Millisecond
			// What ended a connection is counted, logged and of no concern here.
			go func() { _ = s.ServeConn(nc) }()
			continue
		}
		s.mu.Lock()
		closing := s.closing
		s.mu.Unlock()
		if closing {
			return ErrServerClosed
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("accept NBD connections: %w", err)
		}
		// Out of file descriptors, most likely: it passes as clients leave.
		s.opt.Log.Warn("nbd: accept", "error", err)
		select {
		case <-time.After(pause):
			pause = min(2*pause, time.Second)
		case <-s.life.Done():
		}
	}
}

// ServeConn serves one connection, and closes it. It returns nil if the client
// left properly.
func (s *Server) ServeConn(nc net.Conn) error {
	defer nc.Close()
	ctx, cancel := context.WithCancel(s.life)
	defer cancel()
	c := &conn{s: s, raw: nc, nc: nc, cancel: cancel, over: make(chan struct{}), client: Client{Addr: nc.RemoteAddr()}}
	if err := s.enter(c); err != nil {
		return err
	}
	prepare(nc)
	defer s.leave(c)
	err := c.run(ctx)
	if c.nc != nc {
		// TLS wants to be told the end; the client may be gone.
		_ = c.nc.Close()
	}
	return err
}

func (s *Server) enter(c *conn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closing:
		return ErrServerClosed
	case len(s.conns) >= s.opt.MaxConnections:
		s.stats.Refused++
		s.opt.Log.Warn("nbd: connection refused", "client", c.nc.RemoteAddr(), "connections", len(s.conns))
		return fmt.Errorf("nbd: all %d connections are in use", s.opt.MaxConnections)
	}
	s.stats.Accepted++
	s.conns[c] = struct{}{}
	s.over.Add(1)
	return nil
}

func (s *Server) leave(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	if c.client.Session != (Session{}) {
		s.sessions.leave(c, c.client.Session)
	}
	s.stats.Counts.add(c.count.load())
	close(c.over)
	s.over.Done()
}

// Stats returns what happened until now.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Connections = len(s.conns)
	st.InFlightBytes = s.bytes.used()
	for c := range s.conns {
		st.Counts.add(c.count.load())
		c.mu.Lock()
		if c.session != nil {
			st.Entered++
		}
		c.mu.Unlock()
	}
	return st
}

// Shutdown stops accepting, answers new requests with ESHUTDOWN (of a client
// with a Session not at all: it sends them again elsewhere), waits for
// those in flight, flushes every export that is in use, and closes the
// connections. When ctx ends first it returns ctx's error after Close.
func (s *Server) Shutdown(ctx context.Context) error {
	s.stop()
	s.mu.Lock()
	for c := range s.conns {
		c.startDrain()
	}
	s.mu.Unlock()
	over := make(chan struct{})
	go func() {
		s.over.Wait()
		close(over)
	}()
	select {
	case <-over:
		s.kill()
		return nil
	case <-ctx.Done():
		return errors.Join(ctx.Err(), s.Close())
	}
}

// Close ends all connections at once and returns when they are over. Requests
// in flight are canceled; they may still take effect.
func (s *Server) Close() error {
	s.stop()
	s.kill()
	s.mu.Lock()
	for c := range s.conns {
		c.raw.Close()
	}
	s.mu.Unlock()
	s.over.Wait()
	return nil
}

func (s *Server) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing = true
	for l := range s.listeners {
		l.Close()
	}
}

// startDrain makes the connection end as soon as nothing is in flight. One that
// is still in its handshake ends at once.
func (c *conn) startDrain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drain = true
	if c.session == nil {
		c.raw.Close()
		return
	}
	empty, in := c.session.gate.close(), c.in
	go func() {
		<-empty
		in.interrupt()
	}()
}

// protect turns a panic into an error: what a client sends must not end the
// process, whatever we forgot. It lets a panic of the exports' owner go on, for
// that is a broken invariant that nobody may serve past.
func protect(calling *bool, err *error) {
	if *calling {
		return
	}
	if r := recover(); r != nil {
		*err = fmt.Errorf("nbd: panic: %v", r)
	}
}

// run is the life of a connection.
func (c *conn) run(ctx context.Context) error {
	log := c.s.opt.Log.With("client", c.nc.RemoteAddr())
	h, err := c.handshake(ctx)
	if err != nil {
		if err == errAborted {
			return nil
		}
		c.s.countFailure(&c.s.stats.HandshakeFailures)
		log.Debug("nbd: handshake failed", "error", err)
		return fmt.Errorf("nbd handshake: %w", err)
	}
	export := h.entered
	if export.Close != nil {
		defer export.Close()
	}
	log = log.With("export", export.Info.Name)
	log.Info("nbd: client entered", "headers", h.headers, "tls", h.tls == tlsOn)
	err = c.transmit(ctx, h)
	if err != nil {
		log.Info("nbd: client left", "error", err)
	} else {
		log.Info("nbd: client left")
	}
	return err
}

func (s *Server) countFailure(n *uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*n++
}

// handshake returns once the client is in an export and has been told so.
func (c *conn) handshake(ctx context.Context) (_ *handshake, err error) {
	defer protect(&c.calling, &err)
	opt := &c.s.opt
	if err := c.nc.SetDeadline(opt.Now().Add(opt.HandshakeTimeout)); err != nil {
		return nil, err
	}
	c.in = newInput(c.nc, handshakeBytes)
	if _, err := c.nc.Write(wire.AppendGreeting(nil, wire.FixedNewstyle|wire.NoZeroes)); err != nil {
		return nil, err
	}
	p, err := c.in.peek(wire.ClientFlagsLen)
	if err != nil {
		return nil, err
	}
	h := &handshake{exports: callTracker{c}}
	switch {
	case opt.TLS != nil && opt.RequireTLS:
		h.tls = tlsRequired
	case opt.TLS != nil:
		h.tls = tlsOffered
	}
	h.open = func(name string) (*Export, error) { return c.open(ctx, h.session, name) }
	if h.flags, err = wire.ParseClientFlags(p); err != nil {
		return nil, err
	}
	c.in.discard(wire.ClientFlagsLen)
	for h.entered == nil {
		if err := c.oneOption(ctx, h); err != nil {
			if h.entered != nil && h.entered.Close != nil {
				h.entered.Close()
			}
			return nil, err
		}
	}
	return h, nil
}

// oneOption reads an option and writes its answer.
func (c *conn) oneOption(ctx context.Context, h *handshake) error {
	p, err := c.in.peek(wire.OptionHeaderLen)
	if err != nil {
		return err
	}
	o, n, err := wire.ParseOptionHeader(p)
	if err != nil {
		return err
	}
	c.in.discard(wire.OptionHeaderLen)
	read, err := h.admit(o, n)
	if err != nil {
		return err
	}
	var result error
	if read {
		data := make([]byte, n)
		if err := c.in.full(data); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, c.s.opt.HandshakeTimeout)
		result = h.option(ctx, o, data)
		cancel()
	} else if err := c.in.skip(int(n)); err != nil {
		return err
	}
	_, err = c.nc.Write(h.out)
	h.out = h.out[:0]
	switch {
	case result == errStartTLS && err == nil:
		return c.encrypt(ctx, h)
	case result != nil:
		return result
	}
	return err
}

// open enters an export. Attaching a volume, and the end of the connections
// whose place this one takes, may take longer than a handshake should, so they
// have a time of their own.
func (c *conn) open(ctx context.Context, session Session, name string) (*Export, error) {
	opt := &c.s.opt
	if err := c.nc.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, opt.OpenTimeout)
	defer cancel()
	e, err := c.openWithin(ctx, session, name)
	if err == nil {
		// From now on, not only once the client has been told: for Disconnect.
		c.mu.Lock()
		c.export = e.Info
		c.mu.Unlock()
	}
	if deadlineErr := c.nc.SetDeadline(opt.Now().Add(opt.HandshakeTimeout)); err == nil && deadlineErr != nil {
		if e.Close != nil {
			e.Close()
		}
		return nil, deadlineErr
	}
	return e, err
}

func (c *conn) openWithin(ctx context.Context, session Session, name string) (*Export, error) {
	if session != (Session{}) {
		c.joined(session)
		if err := c.s.supersede(ctx, c, session); err != nil {
			return nil, err
		}
	}
	return callTracker{c}.Open(ctx, name)
}

// joined notes a session; a connection that changes it leaves the one before.
func (c *conn) joined(session Session) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.client.Session; old != (Session{}) && old != session {
		c.s.sessions.leave(c, old)
	}
	c.client.Session = session
}

// callTracker is the server's Exports for one connection: it notes that a call
// is under way, and tells who the client is.
type callTracker struct{ c *conn }

func (t callTracker) begin(ctx context.Context) context.Context {
	client, _ := t.c.identity()
	t.c.calling = true
	return context.WithValue(ctx, clientKey{}, client)
}

func (t callTracker) List(ctx context.Context) ([]Info, error) {
	infos, err := t.c.s.exports.List(t.begin(ctx))
	t.c.calling = false
	return infos, err
}

func (t callTracker) Info(ctx context.Context, name string) (Info, error) {
	info, err := t.c.s.exports.Info(t.begin(ctx), name)
	t.c.calling = false
	return info, err
}

func (t callTracker) Open(ctx context.Context, name string) (*Export, error) {
	e, err := t.c.s.exports.Open(t.begin(ctx), name)
	t.c.calling = false
	return e, err
}

// transmit serves the export until the client leaves.
func (c *conn) transmit(ctx context.Context, h *handshake) error {
	opt := &c.s.opt
	if err := c.nc.SetDeadline(time.Time{}); err != nil {
		return err
	}
	s := &session{
		ctx:        ctx,
		cancel:     c.cancel,
		target:     newTarget(h.entered),
		resumes:    h.session != (Session{}),
		headers:    h.headers,
		mapped:     h.mapped && h.mappedFor == h.name,
		in:         c.in,
		out:        newReplies(c.nc, opt.Now, opt.StallTimeout),
		batch:      newBatch(),
		bytes:      newAllowance(c.s.bytes, opt.ConnectionBytes),
		count:      &c.count,
		gate:       newGate(2 * opt.Workers),
		jobs:       make(chan *piece),
		maxWorkers: opt.Workers,
		watch:      watch{nc: c.nc, patience: opt.StallTimeout},
	}
	c.in.resize(inputBytes)
	c.in.idle, c.in.now, c.in.stall = s.flush, opt.Now, opt.StallTimeout
	c.mu.Lock()
	c.session = s
	drain := c.drain
	c.mu.Unlock()
	if drain {
		return ErrServerClosed
	}
	err := s.serve()
	if err != nil && s.out.reason() == errMoved {
		err = errMoved
	}
	drained := c.in.wasInterrupted() && errors.Is(err, os.ErrDeadlineExceeded)
	if err != nil && !drained {
		// Nobody waits for what is in flight.
		c.cancel()
	}
	if finishErr := s.finish(); err == nil {
		err = finishErr
	}
	switch {
	case drained:
		return s.target.flush(ctx)
	case err == errMoved:
		c.s.countFailure(&c.s.stats.Moved)
	case err == io.EOF:
		return fmt.Errorf("client closed the connection: %w", io.ErrUnexpectedEOF)
	case errors.Is(err, wire.ErrMalformed), errors.Is(err, os.ErrDeadlineExceeded):
		c.s.countFailure(&c.s.stats.Violations)
	}
	return err
}
