package iscsi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sort"
	"strings"
	"sync"
	"time"

	"firn.io/firn/iscsi/pdu"
	"firn.io/firn/iscsi/scsi"
)

// ErrServerClosed is returned by Serve after Shutdown or Close.
var ErrServerClosed = errors.New("iscsi: server closed")

// Listen opens "HOST:PORT", or "HOST" on DefaultPort.
func Listen(ctx context.Context, addr string) (net.Listener, error) {
	if _, _, err := net.SplitHostPort(addr); err != nil {
		addr = net.JoinHostPort(strings.Trim(addr, "[]"), DefaultPort)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for iSCSI on %s: %w", addr, err)
	}
	return l, nil
}

// Server serves Targets to any number of initiators.
type Server struct {
	targets Targets
	opt     Options
	life    context.Context
	kill    context.CancelFunc
	over    sync.WaitGroup

	mu        sync.Mutex
	closing   bool
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	// sessions in the full feature phase, also discovery ones.
	sessions map[*session]struct{}
	lastTSIH uint16
	stats    Stats
}

// NewServer returns a server of targets that listens nowhere yet.
func NewServer(targets Targets, opt Options) *Server {
	s := &Server{targets: targets, opt: opt.withDefaults(), listeners: map[net.Listener]struct{}{}, conns: map[*conn]struct{}{}, sessions: map[*session]struct{}{}}
	s.life, s.kill = context.WithCancel(context.Background())
	return s
}

// Serve accepts connections on l until Shutdown or Close, and then returns
// ErrServerClosed; l is closed on return. It may be called for several listeners.
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
			return fmt.Errorf("accept iSCSI connections: %w", err)
		}
		// Out of file descriptors, most likely: it passes as initiators leave.
		s.opt.Log.Warn("iscsi: accept", "error", err)
		select {
		case <-time.After(pause):
			pause = min(2*pause, time.Second)
		case <-s.life.Done():
		}
	}
}

// ServeConn serves one connection, and closes it. It returns nil if the
// initiator logged out.
func (s *Server) ServeConn(nc net.Conn) error {
	defer nc.Close()
	c := newConn(s, nc)
	s.mu.Lock()
	switch {
	case s.closing:
		s.mu.Unlock()
		return ErrServerClosed
	case len(s.conns) >= 2*s.opt.MaxSessions:
		s.stats.Refused++
		s.mu.Unlock()
		s.opt.Log.Warn("iscsi: connection refused", "initiator", nc.RemoteAddr(), "connections", 2*s.opt.MaxSessions)
		return fmt.Errorf("iscsi: all %d connections are in use", 2*s.opt.MaxSessions)
	}
	s.stats.Accepted++
	s.conns[c] = struct{}{}
	s.over.Add(1)
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.conns, c)
		s.over.Done()
	}()
	return c.serve(s.life)
}

// newSession enters the target of a login that has succeeded. An older session
// of the same initiator port ends first, its tasks included (RFC 7143, 6.3.5).
func (s *Server) newSession(ctx context.Context, l *login) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, s.opt.OpenTimeout)
	defer cancel()
	if l.tsih != 0 && l.discovery {
		return nil, refuse(loginNoSession, "a discovery session has one connection")
	}
	old, err := s.predecessor(l)
	if err != nil {
		return nil, err
	}
	if old != nil {
		old.log.Info("iscsi: session is reinstated")
		old.c.nc.Close()
		select {
		case <-old.ended:
		case <-ctx.Done():
			return nil, refuse(loginUnavailable, "the tasks of the older session have not ended yet")
		}
	}
	n := &session{s: s, c: l.c, p: l.p, discovery: l.discovery, initiator: l.initiator, isid: l.isid, cid: l.cid, user: l.auth.user, since: s.opt.Now()}
	if !l.discovery {
		if n.target, err = s.targets.Open(ctx, l.target, l.who()); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing || len(s.sessions) >= s.opt.MaxSessions {
		if n.target != nil {
			n.target.Close()
		}
		return nil, refuse(loginOutOfResource, "all %d sessions are in use", s.opt.MaxSessions)
	}
	n.tsih = s.freeTSIH()
	s.sessions[n] = struct{}{}
	s.stats.Logins++
	first := scsi.AttentionPowerOn
	if old != nil {
		first = scsi.AttentionNexusLoss
	}
	n.begin(l, first)
	return n, nil
}

// predecessor finds the session that a login takes the place of.
func (s *Server) predecessor(l *login) (*session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n := range s.sessions {
		if n.initiator != l.initiator || n.isid != l.isid || n.discovery != l.discovery || !l.discovery && n.target.Name != l.target {
			continue
		}
		switch {
		case l.tsih == 0 || l.tsih == n.tsih && l.cid == n.cid:
			return n, nil
		case l.tsih == n.tsih:
			return nil, refuse(loginTooMany, "a session has one connection")
		}
	}
	if l.tsih != 0 {
		return nil, refuse(loginNoSession, "there is no session %d of this initiator", l.tsih)
	}
	return nil, nil
}

// freeTSIH is called with mu held; there are fewer sessions than numbers.
func (s *Server) freeTSIH() uint16 {
	for {
		s.lastTSIH++
		taken := s.lastTSIH == 0
		for n := range s.sessions {
			taken = taken || n.tsih == s.lastTSIH
		}
		if !taken {
			return s.lastTSIH
		}
	}
}

func (s *Server) forget(n *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, n)
	n.count.addTo(&s.stats)
}

// sharing returns the sessions that have the unit, or all if it is nil.
func (s *Server) sharing(u *scsi.Unit) []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*session
	for n := range s.sessions {
		if n.discovery {
			continue
		}
		for _, l := range n.target.LUNs {
			if u == nil || l.Unit == u {
				all = append(all, n)
				break
			}
		}
	}
	return all
}

// AbortTasks ends the tasks on u of the nexuses that match, but for those of by,
// and returns when they have ended: a Unit's Abort.
func (s *Server) AbortTasks(u *scsi.Unit, by *scsi.Nexus, match func(*scsi.Nexus) bool) {
	var wait sync.WaitGroup
	for _, n := range s.sharing(u) {
		if n.nexus == by || !match(n.nexus) {
			continue
		}
		wait.Add(1)
		n.abort(func(t *task) bool { return t.unit == u }, true, wait.Done)
	}
	wait.Wait()
}

// Leave ends all sessions that have the unit, without waiting for it: their
// initiators log in again.
func (s *Server) Leave(u *scsi.Unit) {
	for _, n := range s.sharing(u) {
		if n.c.isInterrupted() {
			continue
		}
		n.log.Warn("iscsi: the volume is not attached here any more; its session ends")
		n.c.interrupt()
	}
}

// Disconnect ends all sessions that have the unit and returns how many when none
// of their tasks can touch storage any more, or ctx has ended. Tasks in flight are
// not answered: their initiators log in again and repeat them.
func (s *Server) Disconnect(ctx context.Context, u *scsi.Unit) (int, error) {
	all := s.sharing(u)
	for _, n := range all {
		n.log.Info("iscsi: session is disconnected")
		n.c.nc.Close()
	}
	for _, n := range all {
		select {
		case <-n.ended:
		case <-ctx.Done():
			return len(all), fmt.Errorf("a session still has tasks in flight: %w", ctx.Err())
		}
	}
	return len(all), nil
}

// Stats returns what happened until now.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	for n := range s.sessions {
		n.count.addTo(&st)
	}
	st.Sessions = len(s.sessions)
	return st
}

// Sessions describes the sessions, by TSIH.
func (s *Server) Sessions() []SessionInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []SessionInfo
	for n := range s.sessions {
		all = append(all, n.info())
	}
	sort.Slice(all, func(i, j int) bool { return all[i].TSIH < all[j].TSIH })
	return all
}

// CloseSession ends a session and returns when its tasks have ended, or ctx has.
// It is false if there is no such session.
func (s *Server) CloseSession(ctx context.Context, tsih uint16) (bool, error) {
	s.mu.Lock()
	var found *session
	for n := range s.sessions {
		if n.tsih == tsih {
			found = n
		}
	}
	s.mu.Unlock()
	if found == nil {
		return false, nil
	}
	found.c.nc.Close()
	select {
	case <-found.ended:
		return true, nil
	case <-ctx.Done():
		return true, ctx.Err()
	}
}

// Shutdown stops accepting, asks the initiators to log out (Async Message 1),
// waits for the tasks in flight, and closes the connections. When ctx ends first
// it returns ctx's error after Close.
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

// Close ends all connections and returns when they are over.
func (s *Server) Close() error {
	s.stop()
	s.kill()
	s.mu.Lock()
	for c := range s.conns {
		c.nc.Close()
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

func remoteAddr(nc net.Conn) netip.AddrPort {
	a, err := netip.ParseAddrPort(nc.RemoteAddr().String())
	if err != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// portals are what discovery tells.
func (s *Server) portals(nc net.Conn) []string {
	list := s.opt.Portals
	if len(list) == 0 {
		list = []string{nc.LocalAddr().String()}
	}
	out := make([]string, len(list))
	for i, p := range list {
		out[i] = fmt.Sprintf("%s,%d", p, s.opt.Tag)
	}
	return out
}

// sendTargets is the answer to SendTargets (RFC 7143, appendix C).
func (s *Server) sendTargets(ctx context.Context, n *session, value string) ([]pdu.Pair, error) {
	who := Initiator{Name: n.initiator, Addr: n.c.addr}
	var names []string
	switch {
	case value == "All" && n.discovery:
		var err error
		if names, err = s.targets.List(ctx, who); err != nil {
			return nil, err
		}
	case value == "" && !n.discovery:
		names = []string{n.target.Name}
	case value != "" && value != "All" && (n.discovery || strings.EqualFold(value, n.target.Name)):
		if _, err := s.targets.Access(ctx, strings.ToLower(value), who); err == nil {
			names = []string{strings.ToLower(value)}
		}
	default:
		return []pdu.Pair{{Key: "SendTargets", Value: rejectValue}}, nil
	}
	var out []pdu.Pair
	for _, name := range names {
		out = append(out, pdu.Pair{Key: "TargetName", Value: name})
		for _, p := range s.portals(n.c.nc) {
			out = append(out, pdu.Pair{Key: "TargetAddress", Value: p})
		}
	}
	return out, nil
}
