package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"

	"firn.io/firn/nbd/wire"
)

// ErrTLSRequired is for Exports to return from Info and Open for an export that
// only clients with TLS may enter.
var ErrTLSRequired = errors.New("the export needs TLS")

// errStartTLS: the client said NBD_OPT_STARTTLS, and has been answered.
var errStartTLS = errors.New("start TLS")

// tlsMode is what a handshake may do about TLS.
type tlsMode uint8

const (
	// tlsOff: there is none.
	tlsOff tlsMode = iota
	// tlsOffered: the client may start it.
	tlsOffered
	// tlsRequired: the client can do nothing before it has started it.
	tlsRequired
	// tlsOn: it has.
	tlsOn
)

// startTLS answers NBD_OPT_STARTTLS.
func (h *handshake) startTLS(data []byte) error {
	switch {
	case len(data) != 0:
		h.refuse(wire.OptStartTLS, wire.RepErrInvalid, "the option takes no data")
	case h.tls == tlsOff:
		h.refuse(wire.OptStartTLS, wire.RepErrUnsup, "this server has no TLS")
	case h.tls == tlsOn:
		h.refuse(wire.OptStartTLS, wire.RepErrInvalid, "TLS has been started")
	default:
		h.ack(wire.OptStartTLS)
		return errStartTLS
	}
	return nil
}

// barred tells whether an option must wait for TLS; EXPORT_NAME cannot be told.
func (h *handshake) barred(o wire.Option) (bool, error) {
	if h.tls != tlsRequired || o == wire.OptStartTLS || o == wire.OptAbort {
		return false, nil
	}
	if o == wire.OptExportName {
		return true, ErrTLSRequired
	}
	h.refuse(o, wire.RepErrTLSRequired, "this server needs TLS")
	return true, nil
}

// encrypt goes on under TLS. Nothing that was agreed on in the clear holds any
// more, for somebody else may have said it; bytes behind NBD_OPT_STARTTLS that
// were sent in the clear end the connection.
func (c *conn) encrypt(ctx context.Context, h *handshake) error {
	if n := c.in.buffered(); n > 0 {
		return fmt.Errorf("%w: %d bytes in the clear after NBD_OPT_STARTTLS", wire.ErrMalformed, n)
	}
	nc := tls.Server(c.raw, c.s.opt.TLS)
	if err := nc.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	state := nc.ConnectionState()
	c.mu.Lock()
	c.nc, c.client.TLS = nc, &state
	c.mu.Unlock()
	c.in = newInput(nc, handshakeBytes)
	c.s.mu.Lock()
	c.s.stats.Encrypted++
	c.s.mu.Unlock()
	*h = handshake{exports: h.exports, open: h.open, flags: h.flags, options: h.options, tls: tlsOn}
	return nil
}

// clearConn is the socket below TLS, if there is TLS.
func clearConn(nc net.Conn) net.Conn {
	if t, ok := nc.(*tls.Conn); ok {
		return t.NetConn()
	}
	return nc
}
