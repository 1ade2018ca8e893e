// Package faultproxy is a TCP proxy that misbehaves on command: it delays,
// stalls, cuts and half-opens connections between real processes.
package faultproxy

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// Mode is what the proxy does to bytes.
type Mode int

const (
	// Pass forwards after the delay that is set.
	Pass Mode = iota
	// Blackhole accepts and reads nothing on: connections stay open, bytes stop
	// in both directions. What was stopped flows on after a return to Pass.
	Blackhole
	// BlackholeToServer stops only what flows from client to server.
	BlackholeToServer
	// BlackholeToClient stops only what flows from server to client.
	BlackholeToClient
	// Refuse closes new connections at once; open ones go on.
	Refuse
)

// bufferBytes bounds what one direction of one connection holds.
const bufferBytes = 64 << 10

// Proxy forwards connections to one address.
type Proxy struct {
	target   string
	listener net.Listener
	wg       sync.WaitGroup
	ctx      context.Context // ends with Close; owned by the goroutines below
	cancel   context.CancelFunc

	mu      sync.Mutex
	mode    Mode
	delay   time.Duration
	changed chan struct{} // closed and replaced at each change of mode
	conns   map[net.Conn]struct{}
}

// New starts a proxy on a free port of 127.0.0.1. The caller closes it.
func New(target string) (*Proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &Proxy{target: target, listener: l, ctx: ctx, cancel: cancel, changed: make(chan struct{}), conns: map[net.Conn]struct{}{}}
	p.wg.Go(p.accept)
	return p, nil
}

// Addr is where clients connect.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Set changes what happens to bytes from now on. delay is per direction and
// read, and counts in mode Pass.
func (p *Proxy) Set(m Mode, delay time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mode, p.delay = m, delay
	close(p.changed)
	p.changed = make(chan struct{})
}

// Cut resets every open connection; new ones are accepted as the mode says.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		if t, ok := c.(*net.TCPConn); ok {
			t.SetLinger(0) // a reset, not an orderly end
		}
		c.Close()
	}
}

// Connections returns how many connections are open, both sides counted.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.conns)
}

// Close ends everything and waits for it.
func (p *Proxy) Close() {
	p.cancel()
	p.listener.Close()
	p.Cut()
	p.wg.Wait()
}

func (p *Proxy) state() (Mode, time.Duration, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mode, p.delay, p.changed
}

// track enters c, unless the proxy is closing.
func (p *Proxy) track(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil {
		c.Close()
		return false
	}
	p.conns[c] = struct{}{}
	return true
}

func (p *Proxy) drop(c net.Conn) {
	c.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

func (p *Proxy) accept() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			return
		}
		if m, _, _ := p.state(); m == Refuse {
			c.Close()
			continue
		}
		if p.track(c) {
			p.wg.Go(func() { p.serve(c) })
		}
	}
}

func (p *Proxy) serve(client net.Conn) {
	defer p.drop(client)
	var d net.Dialer
	server, err := d.DialContext(p.ctx, "tcp", p.target)
	if err != nil || !p.track(server) {
		return
	}
	defer p.drop(server)
	var both sync.WaitGroup
	both.Go(func() { p.pump(server, client, BlackholeToServer) })
	both.Go(func() { p.pump(client, server, BlackholeToClient) })
	both.Wait()
}

// pump forwards one direction until an error, then ends the connection.
func (p *Proxy) pump(dst, src net.Conn, stoppedBy Mode) {
	buf := make([]byte, bufferBytes)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if !p.hold(stoppedBy) {
				return
			}
			if _, err := dst.Write(buf[:n]); err != nil {
				src.Close()
				return
			}
		}
		if errors.Is(err, io.EOF) {
			if !p.hold(stoppedBy) {
				return
			}
			if t, ok := dst.(*net.TCPConn); ok {
				t.CloseWrite()
			}
			return
		}
		if err != nil {
			dst.Close()
			return
		}
	}
}

// hold waits out a black hole and the delay; false when the proxy closes.
func (p *Proxy) hold(stoppedBy Mode) bool {
	for {
		m, delay, changed := p.state()
		if m != Blackhole && m != stoppedBy {
			if delay == 0 {
				return p.ctx.Err() == nil
			}
			t := time.NewTimer(delay)
			defer t.Stop()
			select {
			case <-t.C:
				return true
			case <-p.ctx.Done():
				return false
			}
		}
		select {
		case <-changed:
		case <-p.ctx.Done():
			return false
		}
	}
}
