package nbd_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"testing"
	"time"

	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/device"
	"firn.io/firn/nbd/wire"
)

// script is a net.Conn whose peer has said all it will ever say. What is
// written is kept, up to a limit.
type script struct {
	in   *bytes.Reader
	out  bytes.Buffer
	max  int
	over bool
}

var errTalkative = errors.New("the server says more than it may")

func (s *script) Read(p []byte) (int, error) { return s.in.Read(p) }

func (s *script) Write(p []byte) (int, error) {
	if s.out.Len()+len(p) > s.max {
		s.over = true
		return 0, errTalkative
	}
	return s.out.Write(p)
}

func (s *script) Close() error                     { return nil }
func (s *script) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (s *script) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

const fuzzBytes = 3<<20 + 512

// FuzzHandshake: any bytes from a client end in an orderly close, and what was
// entered is left.
func FuzzHandshake(f *testing.F) {
	hello := wire.AppendClientFlags(nil, wire.ClientFixedNewstyle|wire.ClientNoZeroes)
	option := func(o wire.Option, data []byte) []byte { return wire.AppendOption(nil, o, data) }
	info := wire.AppendInfoRequest(nil, "a", wire.InfoName, wire.InfoBlockSize)
	meta := wire.AppendMetaRequest(nil, "a", "base:", wire.BaseAllocation)
	f.Add(hello)
	f.Add(append(wire.AppendClientFlags(nil, 0), option(wire.OptExportName, []byte("a"))...))
	f.Add(bytes.Join([][]byte{hello, option(wire.OptList, nil), option(wire.OptAbort, nil)}, nil))
	f.Add(bytes.Join([][]byte{hello, option(wire.OptInfo, info), option(wire.OptGo, info)}, nil))
	f.Add(bytes.Join([][]byte{hello, option(wire.OptStructuredReply, nil), option(wire.OptListMetaContext, meta), option(wire.OptSetMetaContext, meta),
		option(wire.OptGo, info), wire.AppendRequest(nil, wire.SimpleReplies, wire.Request{Command: wire.CmdBlockStatus, Length: 512})}, nil))
	f.Add(bytes.Join([][]byte{hello, option(wire.OptStartTLS, nil), option(99, make([]byte, 70<<10))}, nil))
	f.Add(bytes.Join([][]byte{hello, option(wire.OptExtendedHeaders, nil), option(wire.OptStructuredReply, nil), option(wire.OptSetMetaContext, meta), option(wire.OptGo, info),
		wire.AppendRequest(nil, wire.ExtendedHeaders, wire.Request{Command: wire.CmdTrim, Length: 1 << 20})}, nil))
	f.Add(bytes.Join([][]byte{hello, option(wire.OptSession, wire.AppendSession(nil, wire.Session{ID: [16]byte{1}, Incarnation: 1})), option(wire.OptGo, info)}, nil))
	f.Fuzz(func(t *testing.T, in []byte) {
		c := newCatalog("a", "b")
		s := nbd.NewServer(c, nbd.Options{Workers: 2})
		conn := &script{in: bytes.NewReader(in), max: 64<<10 + 16*len(in) + 64<<20}
		s.ServeConn(conn)
		if c.opens.Load() != c.ends.Load() || s.Stats().Connections != 0 || s.Stats().InFlightBytes != 0 {
			t.Fatalf("%d opened, %d closed, %+v", c.opens.Load(), c.ends.Load(), s.Stats())
		}
		if out := conn.out.Bytes(); len(out) < wire.GreetingLen {
			t.Fatalf("greeting of %d bytes", len(out))
		}
	})
}

// FuzzTransmission: any bytes after the handshake are answered as a plain model
// of the protocol and of a disk answers them. One worker and no lending make
// the order in which requests take effect that in which they were sent.
func FuzzTransmission(f *testing.F) {
	req := func(cmd wire.Command, fl wire.CommandFlags, off uint64, n uint32, data []byte) []byte {
		return append(wire.AppendRequest(nil, wire.SimpleReplies, wire.Request{Flags: fl, Command: cmd, Cookie: 7, Offset: off, Length: uint64(n)}), data...)
	}
	page := bytes.Repeat([]byte("firn"), 1024)
	f.Add(uint8(1), req(wire.CmdRead, 0, 0, 4096, nil))
	f.Add(uint8(0), req(wire.CmdRead, 0, 100, 2<<20, nil))
	f.Add(uint8(1), bytes.Join([][]byte{req(wire.CmdWrite, wire.FlagFUA, 1000, 4096, page), req(wire.CmdRead, 0, 0, 2<<20, nil), req(wire.CmdDisc, 0, 0, 0, nil)}, nil))
	f.Add(uint8(0), bytes.Join([][]byte{req(wire.CmdWrite, 0, 1<<20-100, 4096, page), req(wire.CmdTrim, 0, 1<<20, 512, nil), req(wire.CmdRead, 0, 1<<20-200, 5000, nil)}, nil))
	f.Add(uint8(1), bytes.Join([][]byte{req(wire.CmdWriteZeroes, wire.FlagNoHole, 5, 9, nil), req(wire.CmdBlockStatus, wire.FlagReqOne, 0, 1<<20, nil), req(wire.CmdFlush, 0, 0, 0, nil)}, nil))
	f.Add(uint8(1), req(wire.CmdRead, wire.FlagDF, fuzzBytes-1, 2, nil))
	f.Add(uint8(0), req(wire.CmdWrite, 0, fuzzBytes, 4096, page))
	f.Add(uint8(1), req(77, 0, 0, 0, nil))
	ext := func(cmd wire.Command, fl wire.CommandFlags, off, n uint64, data []byte) []byte {
		return append(wire.AppendRequest(nil, wire.ExtendedHeaders, wire.Request{Flags: fl, Command: cmd, Cookie: 7, Offset: off, Length: n}), data...)
	}
	f.Add(uint8(2), bytes.Join([][]byte{ext(wire.CmdWrite, wire.FlagPayloadLen, 9, 4096, page), ext(wire.CmdTrim, 0, 0, 1<<40, nil), ext(wire.CmdRead, 0, 0, 2<<20, nil)}, nil))
	f.Add(uint8(2), bytes.Join([][]byte{ext(wire.CmdBlockStatus, wire.FlagPayloadLen, 0, 12, wire.AppendStatusPayload(nil, 4096, 1)), ext(wire.CmdDisc, 0, 0, 0, nil)}, nil))
	f.Add(uint8(2), bytes.Join([][]byte{ext(wire.CmdTrim, wire.FlagPayloadLen, 0, 4, []byte("trim")), ext(wire.CmdWriteZeroes, 0, 0, fuzzBytes, nil), ext(wire.CmdFlush, 0, 0, 0, nil)}, nil))
	f.Fuzz(func(t *testing.T, mode uint8, in []byte) {
		headers := wire.Headers(mode % 3)
		d := blocktest.New(blocktest.Options{Name: "a", Bytes: fuzzBytes, NoLending: true})
		s := nbd.NewServer(nbd.Fixed{*device.Export(d, nil)}, nbd.Options{Workers: 1})
		hello := wire.AppendClientFlags(nil, wire.ClientFixedNewstyle|wire.ClientNoZeroes)
		if headers != wire.SimpleReplies {
			o := wire.OptStructuredReply
			if headers == wire.ExtendedHeaders {
				o = wire.OptExtendedHeaders
			}
			hello = wire.AppendOption(hello, o, nil)
			hello = wire.AppendOption(hello, wire.OptSetMetaContext, wire.AppendMetaRequest(nil, "a", wire.BaseAllocation))
		}
		hello = wire.AppendOption(hello, wire.OptExportName, []byte("a"))
		m := runModel(in, headers)
		conn := &script{in: bytes.NewReader(append(hello, in...)), max: 256 << 20}
		s.ServeConn(conn)
		if conn.over {
			t.Fatal(errTalkative)
		}
		if n := s.Stats().InFlightBytes; n != 0 {
			t.Fatalf("%d bytes in flight", n)
		}
		out := conn.out.Bytes()[wire.GreetingLen:]
		for out[0] == 0 && out[1] == 0x03 { // answers to options; the export's size starts 0, 0
			_, _, n, err := wire.ParseOptReplyHeader(out[:wire.OptReplyHeaderLen])
			if err != nil {
				t.Fatal(err)
			}
			out = out[wire.OptReplyHeaderLen+n:]
		}
		m.check(t, out[10:])
		if m.clean {
			got := make([]byte, 1<<20)
			for off := 0; off < fuzzBytes; off += len(got) {
				got = got[:min(len(got), fuzzBytes-off)]
				if err := d.ReadAt(t.Context(), got, int64(off)); err != nil || !bytes.Equal(got, m.disk[off:off+len(got)]) {
					t.Fatalf("the disk differs after %d, %v", off, err)
				}
			}
		}
	})
}

// expected is what the model says of one request.
type expected struct {
	wire.Request
	errno wire.Errno
	data  []byte
}

// model is a disk and the answers that are due, by cookie, in order.
type model struct {
	disk    []byte
	due     map[uint64][]*expected
	headers wire.Headers
	// clean says that the client left between two requests, by NBD_CMD_DISC:
	// then all are done and answered.
	clean bool
}

func runModel(in []byte, headers wire.Headers) *model {
	m := &model{disk: make([]byte, fuzzBytes), due: map[uint64][]*expected{}, headers: headers}
	for n := headers.RequestLen(); len(in) >= n; {
		r, err := wire.ParseRequest(in[:n], headers)
		if err != nil {
			return m
		}
		in = in[n:]
		if r.Command == wire.CmdDisc {
			m.clean = true
			return m
		}
		var payload []byte
		if r.Command == wire.CmdWrite || headers == wire.ExtendedHeaders && r.Flags&wire.FlagPayloadLen != 0 {
			if r.Length > uint64(len(in)) {
				return m
			}
			payload, in = in[:r.Length], in[r.Length:]
			if r.Command == wire.CmdBlockStatus && len(payload) == 12 && payload[11] == 1 && payload[8]|payload[9]|payload[10] == 0 {
				r.Length, r.Flags = binary.BigEndian.Uint64(payload), r.Flags&^wire.FlagPayloadLen
			}
		}
		m.do(r, payload)
	}
	return m
}

func (m *model) do(r wire.Request, payload []byte) {
	e := &expected{Request: r, errno: m.verdict(r)}
	m.due[r.Cookie] = append(m.due[r.Cookie], e)
	if e.errno != 0 || r.Length == 0 {
		return
	}
	part := m.disk[r.Offset:][:r.Length]
	switch r.Command {
	case wire.CmdRead:
		e.data = bytes.Clone(part)
	case wire.CmdWrite:
		copy(part, payload)
	case wire.CmdTrim, wire.CmdWriteZeroes:
		clear(part)
	}
}

func (m *model) verdict(r wire.Request) wire.Errno {
	allowed := wire.FlagFUA
	switch r.Command {
	case wire.CmdRead:
		if m.headers != wire.SimpleReplies {
			allowed |= wire.FlagDF
		}
	case wire.CmdWrite:
		if m.headers == wire.ExtendedHeaders {
			allowed |= wire.FlagPayloadLen
		}
	case wire.CmdWriteZeroes:
		allowed |= wire.FlagNoHole | wire.FlagFastZero
	case wire.CmdBlockStatus:
		if m.headers == wire.SimpleReplies || r.Length == 0 {
			return wire.EINVAL
		}
		allowed |= wire.FlagReqOne
	}
	switch {
	case r.Command >= wire.NumCommands || r.Flags&^allowed != 0:
		return wire.EINVAL
	case r.Command == wire.CmdFlush:
		if r.Offset|r.Length != 0 {
			return wire.EINVAL
		}
		return 0
	case r.Offset <= fuzzBytes && r.Length <= fuzzBytes-r.Offset:
		return 0
	case (r.Command == wire.CmdRead || r.Command == wire.CmdWrite) && r.Length > 32<<20:
		return wire.EINVAL
	case r.Command == wire.CmdWrite || r.Command == wire.CmdWriteZeroes:
		return wire.ENOSPC
	}
	return wire.EINVAL
}

// check reads the server's replies. The same cookie may be in use many times
// (a broken client's fault): then its answers may come in any order, and only
// their number is checked.
func (m *model) check(t *testing.T, out []byte) {
	partial := map[uint64][]byte{}
	seen := map[uint64]int{}
	answered := 0
	for len(out) > 0 {
		if len(out) < 4 || wire.ReplyLen(out) == 0 || len(out) < wire.ReplyLen(out) {
			t.Fatalf("not a reply: %.40x", out)
		}
		r, err := wire.ParseReply(out[:wire.ReplyLen(out)])
		if err != nil {
			t.Fatal(err)
		}
		out = out[wire.ReplyLen(out):]
		due := m.due[r.Cookie]
		if len(due) == 0 || seen[r.Cookie] >= len(due) {
			t.Fatalf("reply %+v to nothing", r)
		}
		if len(due) > 1 {
			return
		}
		e := due[0]
		if m.headers.Structured(e.Command) == r.Simple {
			t.Fatalf("reply %+v to %+v, %s", r, e.Request, m.headers)
		}
		errno, body := r.Errno, []byte(nil)
		switch {
		case r.Simple && r.Errno == 0 && e.Command == wire.CmdRead:
			partial[r.Cookie], out = out[:e.Length], out[e.Length:]
		case !r.Simple:
			body, out = out[:r.Length], out[r.Length:]
		}
		switch {
		case r.Simple:
		case r.Type.IsError():
			if errno, _, _, err = wire.ParseError(r.Type, body); err != nil {
				t.Fatal(err)
			}
		case r.Type == wire.ChunkOffsetData, r.Type == wire.ChunkOffsetHole:
			m.place(t, partial, e, r, body)
		case r.Type.IsStatus():
			m.status(t, e, r.Type, body)
		}
		if !r.Done {
			continue
		}
		// A client that is gone is not waited for.
		if errno != e.errno && (m.clean || errno != wire.ESHUTDOWN) {
			t.Fatalf("%+v answered with %v, want %v", e.Request, errno, e.errno)
		}
		if errno == 0 && !bytes.Equal(partial[r.Cookie], e.data) {
			t.Fatalf("%+v read other bytes", e.Request)
		}
		seen[r.Cookie]++
		answered++
	}
	if m.clean && answered != len(m.due) {
		t.Fatalf("%d of %d requests answered", answered, len(m.due))
	}
}

// place puts a chunk's content where it belongs.
func (m *model) place(t *testing.T, partial map[uint64][]byte, e *expected, r wire.Reply, body []byte) {
	off, n, err := wire.ParseOffset(body, r.Type == wire.ChunkOffsetHole)
	content := make([]byte, n)
	if r.Type == wire.ChunkOffsetData {
		content = body[wire.OffsetDataLen:]
	}
	if err != nil || off < e.Offset || off-e.Offset+uint64(len(content)) > e.Length {
		t.Fatalf("chunk of %d bytes at %d for %+v: %v", len(content), off, e.Request, err)
	}
	if partial[r.Cookie] == nil {
		partial[r.Cookie] = make([]byte, e.Length)
	}
	copy(partial[r.Cookie][off-e.Offset:], content)
}

// status checks that extents stay within what was asked. Their content is for
// TestBlockStatus: the model has no holes.
func (m *model) status(t *testing.T, e *expected, kind wire.ChunkType, body []byte) {
	_, states, err := wire.ParseBlockStatus(nil, kind, body)
	var sum uint64
	for _, s := range states {
		sum += s.Length
	}
	if err != nil || sum == 0 || sum > e.Length || e.Flags&wire.FlagReqOne != 0 && len(states) != 1 {
		t.Fatalf("status %v for %+v: %v", states, e.Request, err)
	}
}
