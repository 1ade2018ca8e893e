// Package iscsitest is an initiator for tests and benchmarks: one session, any
// number of commands in flight, and a LUN of it as a block.Device, so that the
// conformance suite can run through the protocol. It trusts its target.
package iscsitest

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"firn.io/firn/internal/block"
	"firn.io/firn/iscsi/pdu"
)

// Client is a session in its full feature phase.
type Client struct {
	nc net.Conn
	in *bufio.Reader
	// sendSegment is what the target takes in one PDU.
	sendSegment int

	mu       sync.Mutex
	opened   sync.Cond
	cmdSN    uint32
	maxCmdSN uint32
	expStat  uint32
	lastTag  uint32
	commands map[uint32]*command
	err      error
	over     chan struct{}
}

// Result is how a command ended.
type Result struct {
	Status   byte
	Sense    []byte
	Residual uint32
	// Moved is how many bytes of data came in.
	Moved int
}

type command struct {
	out, in []byte
	r       Result
	done    chan struct{}
}

// Dial logs in to a target. keys are more keys and values for the login.
func Dial(ctx context.Context, addr, initiator, target string, keys ...string) (*Client, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	c := &Client{nc: nc, in: bufio.NewReaderSize(nc, 256<<10), sendSegment: 8192, cmdSN: 1, commands: map[uint32]*command{}, over: make(chan struct{})}
	c.opened.L = &c.mu
	text := pdu.AppendText(nil, "InitiatorName", initiator)
	text = pdu.AppendText(text, "TargetName", target)
	text = pdu.AppendText(text, "SessionType", "Normal")
	text = pdu.AppendText(text, "MaxRecvDataSegmentLength", "262144")
	for i := 0; i+1 < len(keys); i += 2 {
		text = pdu.AppendText(text, keys[i], keys[i+1])
	}
	if err := c.login(text); err != nil {
		nc.Close()
		return nil, err
	}
	go c.read()
	return c, nil
}

func (c *Client) login(text []byte) error {
	var h pdu.Header
	h.SetOpcode(pdu.Login)
	h[0] |= 0x40
	h[1] = pdu.Transit | 1<<2 | 3
	copy(h[8:], []byte{0x80, 1, 2, 3, 0, 1})
	h.SetWord(pdu.AtITT, 1)
	h.SetWord(pdu.AtCmdSN, c.cmdSN)
	h.SetDataLen(len(text))
	if _, err := c.nc.Write(append(h[:], append(text, make([]byte, pdu.Padded(len(text))-len(text))...)...)); err != nil {
		return err
	}
	if _, err := io.ReadFull(c.in, h[:]); err != nil {
		return err
	}
	answer := make([]byte, pdu.Padded(h.DataLen()))
	if _, err := io.ReadFull(c.in, answer); err != nil {
		return err
	}
	if status := binary.BigEndian.Uint16(h[36:]); h.Opcode() != pdu.LoginRsp || status != 0 || h[1]&0x83 != 0x83 {
		return fmt.Errorf("iscsitest: a %v with status %04x", h.Opcode(), status)
	}
	c.maxCmdSN, c.expStat = h.Word(pdu.AtMaxCmdSN), h.Word(pdu.AtStatSN)+1
	pairs, err := pdu.ParseText(answer[:h.DataLen()])
	if err != nil {
		return err
	}
	for _, p := range pairs {
		if p.Key == "MaxRecvDataSegmentLength" {
			n, err := pdu.ParseNumber(p.Value)
			if err != nil {
				return err
			}
			c.sendSegment = int(n)
		}
	}
	return nil
}

// Close ends the session; commands in flight fail.
func (c *Client) Close() error {
	err := c.nc.Close()
	<-c.over
	return err
}

// Do runs a command on LUN 0 with out as its data, or for data into in. When ctx
// ends first the command goes on, and out and in stay in use.
func (c *Client) Do(ctx context.Context, cdb, out, in []byte) (Result, error) {
	k := &command{out: out, in: in, done: make(chan struct{})}
	c.mu.Lock()
	for c.err == nil && int32(c.cmdSN-c.maxCmdSN) > 0 {
		c.opened.Wait()
	}
	if c.err != nil {
		c.mu.Unlock()
		return Result{}, c.err
	}
	c.lastTag++
	tag := c.lastTag
	c.commands[tag] = k
	var h pdu.Header
	h.SetOpcode(pdu.Command)
	h[1] = pdu.Final
	switch {
	case len(out) > 0:
		h[1] |= pdu.Write
		h.SetWord(pdu.AtEDTL, uint32(len(out)))
	case len(in) > 0:
		h[1] |= pdu.Read
		h.SetWord(pdu.AtEDTL, uint32(len(in)))
	}
	h.SetWord(pdu.AtITT, tag)
	h.SetWord(pdu.AtCmdSN, c.cmdSN)
	h.SetWord(pdu.AtExpStatSN, c.expStat)
	copy(h.CDB(), cdb)
	c.cmdSN++
	immediate := out[:min(len(out), c.sendSegment, 8192)]
	err := c.send(&h, immediate)
	c.mu.Unlock()
	if err != nil {
		return Result{}, err
	}
	select {
	case <-k.done:
		c.mu.Lock()
		defer c.mu.Unlock()
		return k.r, c.err
	case <-ctx.Done():
		return Result{}, block.Wrap(block.Canceled, ctx.Err(), "iscsitest")
	}
}

// send writes a PDU; mu is held.
func (c *Client) send(h *pdu.Header, data []byte) error {
	h.SetDataLen(len(data))
	p := append(make([]byte, 0, pdu.HeaderLen+pdu.Padded(len(data))), h[:]...)
	p = append(p, data...)
	_, err := c.nc.Write(p[:pdu.HeaderLen+pdu.Padded(len(data))])
	return err
}

// read takes what the target sends until the connection ends.
func (c *Client) read() {
	defer close(c.over)
	var h pdu.Header
	for {
		err := c.one(&h)
		if err == nil {
			continue
		}
		c.mu.Lock()
		c.err = err
		for _, k := range c.commands {
			close(k.done)
		}
		clear(c.commands)
		c.opened.Broadcast()
		c.mu.Unlock()
		return
	}
}

func (c *Client) one(h *pdu.Header) error {
	if _, err := io.ReadFull(c.in, h[:]); err != nil {
		return err
	}
	n := h.DataLen()
	c.mu.Lock()
	k := c.commands[h.ITT()]
	c.mu.Unlock()
	if h.Opcode() == pdu.DataIn && k != nil {
		at := int(h.Word(pdu.AtBufferOffset))
		if at+n > len(k.in) {
			return errors.New("iscsitest: data beyond what was asked for")
		}
		if _, err := io.ReadFull(c.in, k.in[at:at+n]); err != nil {
			return err
		}
		k.r.Moved = max(k.r.Moved, at+n)
		if _, err := c.in.Discard(pdu.Padded(n) - n); err != nil {
			return err
		}
		if h.Has(pdu.DataStatus) {
			return c.ended(h, k)
		}
		return nil
	}
	data := make([]byte, pdu.Padded(n))
	if _, err := io.ReadFull(c.in, data); err != nil {
		return err
	}
	switch h.Opcode() {
	case pdu.Response:
		if n > 2 && k != nil {
			k.r.Sense = data[2:n]
		}
		return c.ended(h, k)
	case pdu.R2T:
		return c.dataOut(h, k)
	case pdu.NopIn, pdu.Async:
		return nil
	}
	return fmt.Errorf("iscsitest: a %v came", h.Opcode())
}

func (c *Client) ended(h *pdu.Header, k *command) error {
	if k == nil {
		return errors.New("iscsitest: an answer to nothing")
	}
	k.r.Status, k.r.Residual = h[3], h.Word(pdu.AtResidual)
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.commands, h.ITT())
	c.maxCmdSN, c.expStat = h.Word(pdu.AtMaxCmdSN), h.Word(pdu.AtStatSN)+1
	c.opened.Broadcast()
	close(k.done)
	return nil
}

// dataOut sends what an R2T asks for.
func (c *Client) dataOut(r *pdu.Header, k *command) error {
	if k == nil {
		return errors.New("iscsitest: data is asked for by no command")
	}
	at, end := int(r.Word(pdu.AtBufferOffset)), int(r.Word(pdu.AtBufferOffset)+r.Word(pdu.AtDesiredLen))
	if end > len(k.out) {
		return errors.New("iscsitest: more data is asked for than there is")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for sn := uint32(0); at < end; sn++ {
		n := min(end-at, c.sendSegment)
		var h pdu.Header
		h.SetOpcode(pdu.DataOut)
		if at+n == end {
			h[1] = pdu.Final
		}
		h.SetWord(pdu.AtITT, r.ITT())
		h.SetWord(pdu.AtTTT, r.Word(pdu.AtTTT))
		h.SetWord(pdu.AtExpStatSN, c.expStat)
		h.SetWord(pdu.AtDataSN, sn)
		h.SetWord(pdu.AtBufferOffset, uint32(at))
		if err := c.send(&h, k.out[at:at+n]); err != nil {
			return err
		}
		at += n
	}
	return nil
}
