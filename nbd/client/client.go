// Package client is an NBD client: fixed newstyle, structured replies,
// base:allocation, with any number of requests in flight. Tests and benchmarks
// use it; it trusts its server with nothing but the data.
package client

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"

	"firn.io/firn/nbd/wire"
)

// maxReply bounds what is not data in an answer of the server.
const maxReply = 128 << 10

// Options of [Dial], [Enter] and [Connect].
type Options struct {
	// Export is the name of the export.
	Export string
	// Simple asks for simple replies; then Map does not work.
	Simple bool
	// TLS, if set, is started before anything else, and required. Its ServerName
	// is what the server's certificate must be for.
	TLS *tls.Config
	// Extended asks for extended headers, and fails if the server has none.
	Extended bool
	// ExportName enters by NBD_OPT_EXPORT_NAME, as old clients do.
	ExportName bool
	// Session, if not zero, is told to the server: the export is entered once
	// the connections whose place this one takes are over there. A server that
	// does not know the option is entered all the same; Export.Session tells.
	Session wire.Session
}

// Conn is a connection that has entered an export. Its methods may be called by
// many goroutines at once.
type Conn struct {
	nc      net.Conn
	r       *bufio.Reader
	info    Export
	headers wire.Headers
	mapID   uint32
	mapped  bool

	mu      sync.Mutex
	out     []byte
	spare   []byte
	writing bool
	calls   map[uint64]*Call
	cookie  uint64
	err     error
	over    chan struct{}
}

// Export is what a server says of an export.
type Export struct {
	Name, Description string
	Bytes             uint64
	Flags             wire.ExportFlags
	Blocks            wire.BlockSizes
	// Session says that the server knows what Options.Session means.
	Session bool
}

// OptionError is a server's refusal of an option.
type OptionError struct {
	Option wire.Option
	Reply  wire.OptReply
	Text   string
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("NBD option %d refused with %#x: %s", e.Option, uint32(e.Reply), e.Text)
}

// Dial connects to addr ("HOST:PORT" or "unix:PATH") and enters an export. ctx
// bounds the handshake.
func Dial(ctx context.Context, addr string, o Options) (*Conn, error) {
	nc, err := dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	return Connect(ctx, nc, o)
}

func dial(ctx context.Context, addr string) (net.Conn, error) {
	var d net.Dialer
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		return d.DialContext(ctx, "unix", path)
	}
	return d.DialContext(ctx, "tcp", addr)
}

// Connect enters an export over nc, which it owns from then on.
func Connect(ctx context.Context, nc net.Conn, o Options) (*Conn, error) {
	c, err := handshake(ctx, nc, o)
	if err != nil {
		return nil, err
	}
	go c.receive()
	return c, nil
}

// handshake enters an export; on failure it closes nc.
func handshake(ctx context.Context, nc net.Conn, o Options) (*Conn, error) {
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	c := &Conn{nc: nc, r: bufio.NewReaderSize(nc, 256<<10), calls: map[uint64]*Call{}, over: make(chan struct{})}
	err := c.enter(ctx, o)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		nc.Close()
		return nil, fmt.Errorf("enter NBD export %q: %w", o.Export, errors.Join(err, ctx.Err()))
	}
	return c, nil
}

// startTLS goes on under TLS.
func (c *Conn) startTLS(ctx context.Context, config *tls.Config) error {
	if err := c.option(wire.OptStartTLS, nil, nil); err != nil {
		return err
	}
	if n := c.r.Buffered(); n > 0 {
		return fmt.Errorf("%w: %d bytes in the clear where TLS starts", wire.ErrMalformed, n)
	}
	nc := tls.Client(c.nc, config)
	if err := nc.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	c.nc = nc
	c.r.Reset(nc)
	return nil
}

// Enter enters an export with simple replies and hands over the socket, on which
// nothing is unread: to give it to a kernel. With Options.TLS that is a *tls.Conn,
// and needs somebody in between. ctx bounds the handshake. A refusal is an
// *OptionError.
func Enter(ctx context.Context, addr string, o Options) (net.Conn, Export, error) {
	nc, err := dial(ctx, addr)
	if err != nil {
		return nil, Export{}, err
	}
	o.Simple = true
	c, err := handshake(ctx, nc, o)
	if err != nil {
		return nil, Export{}, err
	}
	if n := c.r.Buffered(); n > 0 {
		c.nc.Close()
		return nil, Export{}, fmt.Errorf("%w: %d bytes after the handshake", wire.ErrMalformed, n)
	}
	return c.nc, c.info, nil
}

// List returns the names and descriptions of a server's exports over nc, which
// it closes. ctx bounds it.
func List(ctx context.Context, nc net.Conn) ([]Export, error) {
	defer nc.Close()
	defer context.AfterFunc(ctx, func() { nc.Close() })()
	c := &Conn{nc: nc, r: bufio.NewReader(nc)}
	if err := c.greet(); err != nil {
		return nil, err
	}
	var exports []Export
	err := c.option(wire.OptList, nil, func(r wire.OptReply, p []byte) error {
		name, description, err := wire.ParseServer(p)
		exports = append(exports, Export{Name: name, Description: description})
		return err
	})
	if err != nil {
		return nil, err
	}
	return exports, c.option(wire.OptAbort, nil, nil)
}

// Info asks about an export without entering it.
func Info(ctx context.Context, addr, name string) (Export, error) {
	return InfoTLS(ctx, addr, name, nil)
}

// InfoTLS is Info under TLS, if config is not nil.
func InfoTLS(ctx context.Context, addr, name string, config *tls.Config) (Export, error) {
	nc, err := dial(ctx, addr)
	if err != nil {
		return Export{}, err
	}
	defer nc.Close()
	defer context.AfterFunc(ctx, func() { nc.Close() })()
	c := &Conn{nc: nc, r: bufio.NewReader(nc)}
	if err := c.greet(); err != nil {
		return Export{}, err
	}
	if config != nil {
		if err := c.startTLS(ctx, config); err != nil {
			return Export{}, err
		}
	}
	if err := c.infoOrGo(wire.OptInfo, name); err != nil {
		return Export{}, err
	}
	return c.info, c.option(wire.OptAbort, nil, nil)
}

func (c *Conn) greet() error {
	p := make([]byte, wire.GreetingLen)
	if _, err := io.ReadFull(c.r, p); err != nil {
		return err
	}
	f, err := wire.ParseGreeting(p)
	if err != nil {
		return err
	}
	if f&wire.FixedNewstyle == 0 || f&wire.NoZeroes == 0 {
		return fmt.Errorf("server flags %#x: not fixed newstyle with no zeroes", uint16(f))
	}
	_, err = c.nc.Write(wire.AppendClientFlags(nil, wire.ClientFixedNewstyle|wire.ClientNoZeroes))
	return err
}

// option sends an option and gives each answer before the ACK to f.
func (c *Conn) option(o wire.Option, data []byte, f func(wire.OptReply, []byte) error) error {
	if _, err := c.nc.Write(wire.AppendOption(nil, o, data)); err != nil {
		return err
	}
	head := make([]byte, wire.OptReplyHeaderLen)
	for {
		if _, err := io.ReadFull(c.r, head); err != nil {
			return err
		}
		for_, r, n, err := wire.ParseOptReplyHeader(head)
		switch {
		case err != nil:
			return err
		case for_ != o || n > maxReply:
			return fmt.Errorf("%w: answer to option %d with %d bytes, want option %d", wire.ErrMalformed, for_, n, o)
		}
		p := make([]byte, n)
		if _, err := io.ReadFull(c.r, p); err != nil {
			return err
		}
		switch {
		case r == wire.RepAck:
			return nil
		case r.IsError():
			return &OptionError{o, r, string(p)}
		case f != nil:
			if err := f(r, p); err != nil {
				return err
			}
		}
	}
}

func (c *Conn) infoOrGo(o wire.Option, name string) error {
	data := wire.AppendInfoRequest(nil, name, wire.InfoName, wire.InfoDescription, wire.InfoBlockSize)
	return c.option(o, data, func(r wire.OptReply, p []byte) error {
		if r != wire.RepInfo {
			return nil
		}
		i, err := wire.ParseInfoReply(p)
		switch i.Type {
		case wire.InfoExport:
			c.info.Bytes, c.info.Flags = i.Size, i.Flags
		case wire.InfoName:
			c.info.Name = i.Text
		case wire.InfoDescription:
			c.info.Description = i.Text
		case wire.InfoBlockSize:
			c.info.Blocks = i.Blocks
		}
		return err
	})
}

func (c *Conn) enter(ctx context.Context, o Options) error {
	if err := c.greet(); err != nil {
		return err
	}
	if o.TLS != nil {
		if err := c.startTLS(ctx, o.TLS); err != nil {
			return err
		}
	}
	if !o.Simple {
		option := wire.OptStructuredReply
		c.headers = wire.StructuredReplies
		if o.Extended {
			option, c.headers = wire.OptExtendedHeaders, wire.ExtendedHeaders
		}
		if err := c.option(option, nil, nil); err != nil {
			return err
		}
		data := wire.AppendMetaRequest(nil, o.Export, wire.BaseAllocation)
		err := c.option(wire.OptSetMetaContext, data, func(r wire.OptReply, p []byte) error {
			id, name, err := wire.ParseMetaContext(p)
			if err == nil && name == wire.BaseAllocation {
				c.mapID, c.mapped = id, true
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	known, err := c.tellSession(o.Session)
	if err != nil {
		return err
	}
	c.info.Session = known
	if !o.ExportName {
		return c.infoOrGo(wire.OptGo, o.Export)
	}
	if _, err := c.nc.Write(wire.AppendOption(nil, wire.OptExportName, []byte(o.Export))); err != nil {
		return err
	}
	p := make([]byte, 10)
	if _, err := io.ReadFull(c.r, p); err != nil {
		return err
	}
	i, err := wire.ParseInfoReply(append([]byte{0, 0}, p...))
	c.info = Export{Name: o.Export, Bytes: i.Size, Flags: i.Flags, Blocks: wire.BlockSizes{Min: 512, Preferred: 4096, Max: wire.MaxPayload}, Session: known}
	return err
}

// tellSession tells whether the server knows what a session is.
func (c *Conn) tellSession(s wire.Session) (bool, error) {
	if s == (wire.Session{}) {
		return false, nil
	}
	err := c.option(wire.OptSession, wire.AppendSession(nil, s), nil)
	var refused *OptionError
	if errors.As(err, &refused) && refused.Reply == wire.RepErrUnsup {
		return false, nil
	}
	return err == nil, err
}

// Export returns what the server said of the export when it was entered.
func (c *Conn) Export() Export { return c.info }

// Close disconnects as the protocol wants it: the server ends what is in flight
// first. Calls without an answer fail.
func (c *Conn) Close() error {
	c.mu.Lock()
	c.out = wire.AppendRequest(c.out, c.headers, wire.Request{Command: wire.CmdDisc})
	c.mu.Unlock()
	err := c.Flush()
	if errors.Is(err, ErrClosed) {
		// The server was quicker to leave than this call to notice.
		err = nil
	}
	if err == nil {
		<-c.over
	}
	if closeErr := c.nc.Close(); err == nil && !errors.Is(closeErr, net.ErrClosed) {
		err = closeErr
	}
	return err
}

// Abort closes the socket at once.
func (c *Conn) Abort() error { return c.nc.Close() }
