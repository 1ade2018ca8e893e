package iscsi

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/iscsi/pdu"
)

// inputBytes is the size of the buffer that requests are parsed in.
const inputBytes = 128 << 10

// conn is one connection from accept to close.
type conn struct {
	s    *Server
	nc   net.Conn
	addr netip.AddrPort
	in   *bufio.Reader
	out  *sender
	// header of the PDU that is read, and what follows it.
	header pdu.Header
	ahs    []byte

	mu      sync.Mutex
	session *session
	drain   bool
	// interrupted ends reading for good.
	interrupted bool
}

func newConn(s *Server, nc net.Conn) *conn {
	if tcp, ok := nc.(*net.TCPConn); ok {
		// A socket on which these fail is already closed; the first read says so.
		_ = tcp.SetNoDelay(true)
		_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 6})
	}
	c := &conn{s: s, nc: nc, addr: remoteAddr(nc), out: newSender(nc, &s.opt)}
	c.in = bufio.NewReaderSize(nc, 16<<10)
	return c
}

// serve is the life of a connection.
func (c *conn) serve(ctx context.Context) error {
	log := c.s.opt.Log.With("address", c.nc.RemoteAddr())
	n, err := c.login(ctx)
	if err != nil {
		c.s.mu.Lock()
		c.s.stats.FailedLogins++
		c.s.mu.Unlock()
		// A port scan is not worth a warning; a refused initiator is.
		if errors.As(err, new(*loginError)) || errors.Is(err, errAuthentication) {
			log.Warn("iscsi: login refused", "error", err)
		} else {
			log.Debug("iscsi: login failed", "error", err)
		}
		return err
	}
	n.log.Info("iscsi: session begins", "tsih", n.tsih)
	err = n.run()
	n.end()
	n.log.Info("iscsi: session ends", "tsih", n.tsih, "error", err)
	return err
}

// login negotiates under a deadline and returns the session.
func (c *conn) login(ctx context.Context) (*session, error) {
	deadline := c.s.opt.Now().Add(c.s.opt.LoginTimeout)
	if err := c.nc.SetDeadline(deadline); err != nil {
		return nil, err
	}
	l := &login{c: c}
	err := l.run(ctx)
	c.mu.Lock()
	n := c.session
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if err := c.nc.SetReadDeadline(time.Time{}); err != nil {
		n.end()
		return nil, err
	}
	return n, nil
}

// readLogin reads a PDU of a login: no digests yet, and little data.
func (c *conn) readLogin() (*pdu.Header, []byte, error) {
	h := new(pdu.Header)
	if _, err := io.ReadFull(c.in, h[:]); err != nil {
		return nil, nil, fmt.Errorf("iscsi login: %w", err)
	}
	if h.Opcode() != pdu.Login || h.AHSLen() != 0 {
		return nil, nil, fmt.Errorf("iscsi login: a %v came instead of a login request", h.Opcode())
	}
	n := h.DataLen()
	if n > defaultSegment {
		return nil, nil, fmt.Errorf("iscsi login: a request with %d bytes, at most %d are allowed", n, defaultSegment)
	}
	data := make([]byte, pdu.Padded(n))
	if _, err := io.ReadFull(c.in, data); err != nil {
		return nil, nil, fmt.Errorf("iscsi login: %w", err)
	}
	return h, data[:n], nil
}

// errGone says that the initiator is silent for too long.
var errGone = errors.New("iscsi: the initiator does not answer")

// next reads a header, its additional segments and their digest into c.header
// and c.ahs. Between PDUs it flushes what waits, and asks a silent initiator
// whether it is there.
func (c *conn) next(n *session) error {
	if c.in.Buffered() < pdu.HeaderLen {
		if err := c.out.flush(); err != nil {
			return err
		}
	}
	for asked := false; c.in.Buffered() == 0; {
		if err := c.deadline(c.s.opt.PingInterval); err != nil {
			return err
		}
		_, err := c.in.Peek(1)
		switch {
		case err == nil:
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		case c.isInterrupted():
			return net.ErrClosed
		case asked:
			return errGone
		default:
			n.ping()
			asked = true
		}
	}
	if c.in.Buffered() < pdu.HeaderLen {
		if err := c.deadline(c.s.opt.StallTimeout); err != nil {
			return err
		}
	}
	if _, err := io.ReadFull(c.in, c.header[:]); err != nil {
		return err
	}
	if err := c.within(c.header.AHSLen() + pdu.DigestLen); err != nil {
		return err
	}
	c.ahs = c.ahs[:0]
	if k := c.header.AHSLen(); k > 0 {
		c.ahs = append(c.ahs, make([]byte, k)...)
		if _, err := io.ReadFull(c.in, c.ahs); err != nil {
			return err
		}
	}
	if !n.p.headerDigest {
		return nil
	}
	return c.digest(block.UpdateCRC(block.CRC(c.header[:]), c.ahs), "header")
}

// within bounds the time that the next k bytes of a message may take.
func (c *conn) within(k int) error {
	if c.in.Buffered() >= k {
		return nil
	}
	return c.deadline(c.s.opt.StallTimeout)
}

// deadline sets the read deadline, unless reading has been ended.
func (c *conn) deadline(d time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.interrupted {
		return net.ErrClosed
	}
	return c.nc.SetReadDeadline(c.s.opt.Now().Add(d))
}

func (c *conn) isInterrupted() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.interrupted
}

// digest reads a digest and compares it with sum. A wrong one ends the
// connection: at this recovery level nothing less is left (RFC 7143, 7.8).
func (c *conn) digest(sum uint32, what string) error {
	var d [pdu.DigestLen]byte
	if _, err := io.ReadFull(c.in, d[:]); err != nil {
		return err
	}
	if got := uint32(d[0]) | uint32(d[1])<<8 | uint32(d[2])<<16 | uint32(d[3])<<24; got != sum {
		return fmt.Errorf("iscsi: %s digest of a %v is wrong: %08x, computed %08x", what, c.header.Opcode(), got, sum)
	}
	return nil
}

// data reads the data segment of the current PDU: the first len(p) bytes into p,
// the rest, if longer, away; and the digest.
func (c *conn) data(n *session, p []byte) error {
	total := c.header.DataLen()
	if total == 0 {
		return nil
	}
	if err := c.within(pdu.Padded(total) + pdu.DigestLen); err != nil {
		return err
	}
	p = p[:min(len(p), total)]
	if _, err := io.ReadFull(c.in, p); err != nil {
		return err
	}
	rest := pdu.Padded(total) - len(p)
	if !n.p.dataDigest {
		_, err := c.in.Discard(rest)
		return err
	}
	sum := block.CRC(p)
	for rest > 0 {
		q, err := c.in.Peek(min(rest, c.in.Size()))
		if err != nil {
			return err
		}
		sum = block.UpdateCRC(sum, q)
		rest -= len(q)
		if _, err := c.in.Discard(len(q)); err != nil {
			return err
		}
	}
	return c.digest(sum, "data")
}

// interrupt ends the current read and all later ones.
func (c *conn) interrupt() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.interrupted = true
	_ = c.nc.SetReadDeadline(time.Unix(1, 0))
}

// startDrain makes the connection end as soon as its tasks have; one in login
// ends at once.
func (c *conn) startDrain() {
	c.mu.Lock()
	n := c.session
	c.drain = true
	c.mu.Unlock()
	if n == nil {
		c.nc.Close()
		return
	}
	n.drain()
}
