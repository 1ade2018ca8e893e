package nbd

import (
	"context"
	"crypto/tls"
	"fmt"
	"io/fs"
	"net"
	"sync"

	"firn.io/firn/nbd/wire"
)

// Session is what a client said with Firn's option wire.OptSession.
type Session = wire.Session

// Client is what the server knows of the client that asks something of Exports.
type Client struct {
	Addr net.Addr
	// TLS is nil in the clear. Its PeerCertificates were verified if
	// [Options.TLS] says that client certificates are.
	TLS *tls.ConnectionState
	// Session is the zero Session if the client did not say.
	Session Session
}

type clientKey struct{}

// ClientOf returns the client on whose behalf a method of Exports is called
// with ctx.
func ClientOf(ctx context.Context) (Client, bool) {
	c, ok := ctx.Value(clientKey{}).(Client)
	return c, ok
}

// errOlder refuses a connection that comes after the one that took its place.
var errOlder = fmt.Errorf("a newer incarnation of this session is connected: %w", fs.ErrPermission)

// sessions are the connections of clients that said which session they belong
// to (F7). An entry lives as long as one of its connections.
type sessions struct {
	mu   sync.Mutex
	open map[[16]byte]map[*conn]Session
}

// join adds c and returns the connections whose place it takes.
func (t *sessions) join(c *conn, s Session) (older []*conn, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for other, o := range t.open[s.ID] {
		switch {
		case o.Incarnation > s.Incarnation:
			return nil, errOlder
		case other != c && (o.Incarnation < s.Incarnation || o.Connection == s.Connection):
			older = append(older, other)
		}
	}
	if t.open == nil {
		t.open = map[[16]byte]map[*conn]Session{}
	}
	if t.open[s.ID] == nil {
		t.open[s.ID] = map[*conn]Session{}
	}
	t.open[s.ID][c] = s
	return older, nil
}

func (t *sessions) leave(c *conn, s Session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.open[s.ID], c)
	if len(t.open[s.ID]) == 0 {
		delete(t.open, s.ID)
	}
}

// supersede ends the connections whose place c takes and returns when they are
// over: nothing that was sent on them takes effect from then on.
func (s *Server) supersede(ctx context.Context, c *conn, session Session) error {
	older, err := s.sessions.join(c, session)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.stats.Superseded += uint64(len(older))
	s.mu.Unlock()
	if len(older) > 0 {
		s.opt.Log.Info("nbd: client is back", "client", c.nc.RemoteAddr(), "incarnation", session.Incarnation, "replaced", len(older))
	}
	return endAll(ctx, older)
}

// Disconnect ends the connections that match says, by what is known of the
// client and by the export as it was when it entered it (the zero Info before
// that), and returns how many when they are over: what they had not read is
// discarded, their requests in flight have ended, their exports are closed. A
// Backend whose calls do not end with their context is waited for, until ctx ends.
func (s *Server) Disconnect(ctx context.Context, match func(c Client, export Info) bool) (int, error) {
	var ended []*conn
	s.mu.Lock()
	for c := range s.conns {
		if match(c.identity()) {
			ended = append(ended, c)
		}
	}
	s.mu.Unlock()
	return len(ended), endAll(ctx, ended)
}

func endAll(ctx context.Context, conns []*conn) error {
	for _, c := range conns {
		c.end()
	}
	for _, c := range conns {
		select {
		case <-c.over:
		case <-ctx.Done():
			return fmt.Errorf("an older connection still has requests in flight: %w", ctx.Err())
		}
	}
	return nil
}

// end makes the connection end now: its socket is closed, what is read but not
// begun is refused, and what is in flight is canceled.
func (c *conn) end() {
	c.mu.Lock()
	c.drain = true
	session := c.session
	c.mu.Unlock()
	if session != nil {
		session.gate.close()
	}
	c.cancel()
	c.raw.Close()
}

// identity is what Disconnect shows of a connection.
func (c *conn) identity() (Client, Info) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.client, c.export
}
