package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"firn.io/firn/nbd/wire"
)

// ErrClosed is the end of a connection that was closed on this side.
var ErrClosed = errors.New("NBD connection is closed")

// Call is a request in flight. A Call may be used again after Done.
type Call struct {
	Command wire.Command
	Flags   wire.CommandFlags
	Off     uint64
	// Bytes is the length of commands without payload.
	Bytes uint64
	// Data is read into, or written. It belongs to the Conn until Done.
	Data []byte
	// States are a block status' extents; they are appended.
	States []wire.State
	// Done is called once with the outcome: nil, a wire.Errno, or what broke the
	// connection. It runs on the goroutine that reads the connection: it may
	// call Submit, but must not wait.
	Done func(*Call, error)

	err error
	got int
}

// Submit queues a call. It leaves with the next Flush, or at the latest before
// the connection waits for the next reply. If Submit fails, Done is not called.
func (c *Conn) Submit(call *Call) error {
	n := call.Bytes
	if call.Command == wire.CmdRead || call.Command == wire.CmdWrite {
		if len(call.Data) > wire.MaxPayload {
			return fmt.Errorf("%w: %d bytes in one request", wire.EINVAL, len(call.Data))
		}
		n = uint64(len(call.Data))
	}
	f := call.Flags
	switch {
	case c.headers == wire.ExtendedHeaders && call.Command == wire.CmdWrite:
		f |= wire.FlagPayloadLen
	case c.headers != wire.ExtendedHeaders && n > math.MaxUint32:
		return fmt.Errorf("%w: %d bytes in one request without extended headers", wire.EINVAL, n)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	c.cookie++
	call.err, call.got = nil, 0
	c.calls[c.cookie] = call
	c.out = wire.AppendRequest(c.out, c.headers, wire.Request{Flags: f, Command: call.Command, Cookie: c.cookie, Offset: call.Off, Length: n})
	if call.Command == wire.CmdWrite {
		c.out = append(c.out, call.Data...)
	}
	return nil
}

// Flush sends what was submitted. If another goroutine is sending, that one
// sends it.
func (c *Conn) Flush() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.writing {
		return c.err
	}
	c.writing = true
	for len(c.out) > 0 && c.err == nil {
		c.out, c.spare = c.spare[:0], c.out
		c.mu.Unlock()
		_, err := c.nc.Write(c.spare)
		c.mu.Lock()
		if err != nil {
			c.fail(err)
		}
	}
	c.writing = false
	return c.err
}

// fail is called with c.mu held. The reading goroutine tells the calls.
func (c *Conn) fail(err error) {
	if c.err == nil {
		c.err = err
		c.nc.Close()
	}
}

// receive reads replies until the connection is over.
func (c *Conn) receive() {
	defer close(c.over)
	err := c.replies()
	c.mu.Lock()
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w by the server", ErrClosed)
	}
	c.fail(err)
	calls := c.calls
	c.calls = nil
	err = c.err
	c.mu.Unlock()
	for _, call := range calls {
		call.Done(call, err)
	}
}

func (c *Conn) replies() error {
	for {
		if c.r.Buffered() == 0 {
			if err := c.Flush(); err != nil {
				return err
			}
		}
		magic, err := c.r.Peek(4)
		if err != nil {
			return err
		}
		n := wire.ReplyLen(magic)
		head, err := c.r.Peek(n)
		if err != nil {
			return err
		}
		r, err := wire.ParseReply(head)
		if err != nil {
			return err
		}
		c.r.Discard(n)
		c.mu.Lock()
		call := c.calls[r.Cookie]
		if call != nil && !c.framed(call, r, n) {
			call = nil
		}
		if call != nil && r.Done {
			delete(c.calls, r.Cookie)
		}
		c.mu.Unlock()
		if call == nil {
			return fmt.Errorf("%w: a reply that answers nothing in flight, to %d", wire.ErrMalformed, r.Cookie)
		}
		if r.Simple {
			err = c.simple(call, r)
		} else {
			err = c.chunk(call, r)
		}
		if err != nil {
			if r.Done {
				call.Done(call, err)
			}
			return err
		}
		if r.Done {
			if call.err == nil && call.Command == wire.CmdRead && call.got != len(call.Data) {
				call.err = fmt.Errorf("%w: %d of %d bytes read", wire.ErrMalformed, call.got, len(call.Data))
			}
			call.Done(call, call.err)
		}
	}
}

// framed tells whether a header of n bytes is what was agreed on.
func (c *Conn) framed(call *Call, r wire.Reply, n int) bool {
	if c.headers == wire.ExtendedHeaders {
		return n == wire.ExtChunkHeaderLen && r.Offset == call.Off
	}
	return n == wire.SimpleReplyLen || n == wire.ChunkHeaderLen && c.headers == wire.StructuredReplies
}

func (c *Conn) simple(call *Call, r wire.Reply) error {
	switch {
	case r.Errno != 0:
		call.err = r.Errno
	case c.headers.Structured(call.Command):
		return fmt.Errorf("%w: simple reply to a %s", wire.ErrMalformed, call.Command)
	case call.Command == wire.CmdRead:
		n, err := io.ReadFull(c.r, call.Data)
		call.got = n
		return err
	}
	return nil
}

func (c *Conn) chunk(call *Call, r wire.Reply) error {
	if r.Type == wire.ChunkOffsetData && call.Command == wire.CmdRead {
		return c.content(call, r)
	}
	if r.Length > maxReply+uint64(len(call.Data)) {
		return fmt.Errorf("%w: chunk of %d bytes", wire.ErrMalformed, r.Length)
	}
	p := make([]byte, r.Length)
	if _, err := io.ReadFull(c.r, p); err != nil {
		return err
	}
	switch {
	case r.Type == wire.ChunkNone && len(p) == 0:
	case r.Type == wire.ChunkOffsetHole && call.Command == wire.CmdRead:
		off, n, err := wire.ParseOffset(p, true)
		if err != nil {
			return err
		}
		part, err := call.part(off, uint64(n))
		clear(part)
		return err
	case r.Type.IsStatus() && call.Command == wire.CmdBlockStatus:
		_, states, err := wire.ParseBlockStatus(call.States, r.Type, p)
		call.States = states
		return err
	case r.Type.IsError():
		e, text, _, err := wire.ParseError(r.Type, p)
		if err != nil {
			return err
		}
		if call.err == nil {
			call.err = fmt.Errorf("%w: %s", e, text)
		}
	default:
		return fmt.Errorf("%w: chunk of type %d in answer to a %s", wire.ErrMalformed, r.Type, call.Command)
	}
	return nil
}

// content reads a data chunk to where it belongs.
func (c *Conn) content(call *Call, r wire.Reply) error {
	p, err := c.r.Peek(wire.OffsetDataLen)
	if err != nil || r.Length <= wire.OffsetDataLen {
		return errors.Join(err, wire.ErrMalformed)
	}
	off, _, err := wire.ParseOffset(p, false)
	if err != nil {
		return err
	}
	c.r.Discard(wire.OffsetDataLen)
	part, err := call.part(off, uint64(r.Length-wire.OffsetDataLen))
	if err != nil {
		return err
	}
	_, err = io.ReadFull(c.r, part)
	return err
}

// part returns where [off, off+n) of the volume goes, and counts it as read.
func (call *Call) part(off, n uint64) ([]byte, error) {
	at := off - call.Off
	if off < call.Off || at > uint64(len(call.Data)) || n > uint64(len(call.Data))-at {
		return nil, fmt.Errorf("%w: content of %d bytes at %d in answer to a read of %d at %d", wire.ErrMalformed, n, off, len(call.Data), call.Off)
	}
	call.got += int(n)
	return call.Data[at : at+n], nil
}

// Do submits a call and waits for it. When ctx ends first the call goes on, and
// Data and States must not be touched: Do returns ctx's error.
func (c *Conn) Do(ctx context.Context, call *Call) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	done := make(chan error, 1)
	call.Done = func(_ *Call, err error) { done <- err }
	if err := c.Submit(call); err != nil {
		return err
	}
	if err := c.Flush(); err != nil {
		return err
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
