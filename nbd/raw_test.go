package nbd_test

import (
	"encoding/hex"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"firn.io/firn/nbd/wire"
)

// raw speaks the protocol byte by byte, to say what no client would.
type raw struct {
	t       testing.TB
	nc      net.Conn
	headers wire.Headers
	cookie  uint64
}

// rawDial connects, and greets unless flags is negative.
func rawDial(t testing.TB, addr string, flags int64) *raw {
	t.Helper()
	network, address := "tcp", addr
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		network, address = "unix", path
	}
	nc, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	// A server that hangs fails the test instead of the run.
	nc.SetDeadline(time.Now().Add(2 * time.Minute))
	return rawOn(t, nc, flags)
}

func rawOn(t testing.TB, nc net.Conn, flags int64) *raw {
	r := &raw{t: t, nc: nc}
	f, err := wire.ParseGreeting(r.read(wire.GreetingLen))
	if err != nil || f != wire.FixedNewstyle|wire.NoZeroes {
		t.Fatalf("greeting: flags %#x, %v", f, err)
	}
	if flags >= 0 {
		r.send(wire.AppendClientFlags(nil, wire.ClientFlags(flags)))
	}
	return r
}

const rawFlags = int64(wire.ClientFixedNewstyle | wire.ClientNoZeroes)

// rawEnter connects and enters an export.
func rawEnter(t testing.TB, addr, export string, structured bool) *raw {
	t.Helper()
	r := rawDial(t, addr, rawFlags)
	r.enter(export, structured)
	return r
}

func (r *raw) enter(export string, structured bool) {
	r.t.Helper()
	if structured {
		r.wantAck(wire.OptStructuredReply, nil)
		r.wantAck(wire.OptSetMetaContext, wire.AppendMetaRequest(nil, export, wire.BaseAllocation))
		r.headers = wire.StructuredReplies
	}
	r.wantAck(wire.OptGo, wire.AppendInfoRequest(nil, export))
}

func (r *raw) send(p []byte) {
	r.t.Helper()
	if _, err := r.nc.Write(p); err != nil {
		r.t.Fatalf("send: %v", err)
	}
}

func (r *raw) read(n int) []byte {
	r.t.Helper()
	p := make([]byte, n)
	if _, err := io.ReadFull(r.nc, p); err != nil {
		r.t.Fatalf("receive %d bytes: %v", n, err)
	}
	return p
}

// wantClosed checks that the server has closed without saying more.
func (r *raw) wantClosed() {
	r.t.Helper()
	var netErr net.Error
	n, err := io.Copy(io.Discard, r.nc)
	if n != 0 || errors.As(err, &netErr) && netErr.Timeout() {
		r.t.Errorf("connection not closed: %d more bytes, %v", n, err)
	}
}

// answer is one reply to an option.
type answer struct {
	reply wire.OptReply
	data  []byte
}

// option sends an option and reads its answers up to the last.
func (r *raw) option(o wire.Option, data []byte) (answers []answer) {
	r.t.Helper()
	r.send(wire.AppendOption(nil, o, data))
	for {
		a := r.answer(o)
		if answers = append(answers, a); a.reply == wire.RepAck || a.reply.IsError() {
			return answers
		}
	}
}

func (r *raw) answer(o wire.Option) answer {
	r.t.Helper()
	got, reply, n, err := wire.ParseOptReplyHeader(r.read(wire.OptReplyHeaderLen))
	if err != nil || got != o {
		r.t.Fatalf("answer to option %d, want %d: %v", got, o, err)
	}
	return answer{reply, r.read(int(n))}
}

func (r *raw) wantAck(o wire.Option, data []byte) []answer {
	r.t.Helper()
	answers := r.option(o, data)
	if last := answers[len(answers)-1]; last.reply != wire.RepAck {
		r.t.Fatalf("option %d: answer %#x %q", o, uint32(last.reply), last.data)
	}
	return answers[:len(answers)-1]
}

func (r *raw) wantRefusal(o wire.Option, data []byte, want wire.OptReply) string {
	r.t.Helper()
	answers := r.option(o, data)
	if len(answers) != 1 || answers[0].reply != want {
		r.t.Fatalf("option %d: answers %v, want one %#x", o, answers, uint32(want))
	}
	return string(answers[0].data)
}

// request sends a request, with data if it is a write.
func (r *raw) request(cmd wire.Command, f wire.CommandFlags, off uint64, n uint32, data []byte) uint64 {
	r.t.Helper()
	return r.request64(cmd, f, off, uint64(n), data)
}

func (r *raw) request64(cmd wire.Command, f wire.CommandFlags, off, n uint64, data []byte) uint64 {
	r.t.Helper()
	r.cookie++
	r.send(append(wire.AppendRequest(nil, r.headers, wire.Request{Flags: f, Command: cmd, Cookie: r.cookie, Offset: off, Length: n}), data...))
	return r.cookie
}

// reply is one reply, or one chunk.
type reply struct {
	wire.Reply
	data []byte
	off  uint64
	text string
}

// reply reads a reply; n is how many bytes of data follow a simple success.
func (r *raw) reply(n int) (p reply) {
	r.t.Helper()
	head := r.read(4)
	length := wire.ReplyLen(head)
	if length == 0 {
		r.t.Fatalf("a reply that starts with %x", head)
	}
	var err error
	if p.Reply, err = wire.ParseReply(append(head, r.read(length-4)...)); err != nil {
		r.t.Fatal(err)
	}
	if p.Simple {
		if p.Errno == 0 {
			p.data = r.read(n)
		}
		return p
	}
	p.data = r.read(int(p.Length))
	if p.Type.IsError() {
		if p.Errno, p.text, p.off, err = wire.ParseError(p.Type, p.data); err != nil {
			r.t.Fatal(err)
		}
	}
	return p
}

// wantErrno sends a request and checks its single answer, which is 0 for
// success without data.
func (r *raw) wantErrno(want wire.Errno, cmd wire.Command, f wire.CommandFlags, off uint64, n uint32, data []byte) {
	r.t.Helper()
	cookie := r.request(cmd, f, off, n, data)
	p := r.reply(0)
	if p.Cookie != cookie || p.Errno != want || !p.Done {
		r.t.Errorf("%s flags %#x of %d at %d: reply %+v, want %v", cmd, uint16(f), n, off, p, want)
	}
	if r.headers.Structured(cmd) == p.Simple {
		r.t.Errorf("%s: simple reply is %v, %s", cmd, p.Simple, r.headers)
	}
}

// alive checks that the connection still works.
func (r *raw) alive() {
	r.t.Helper()
	r.wantErrno(0, wire.CmdFlush, 0, 0, 0, nil)
}

// unhex reads bytes written with spaces between them.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	p, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return p
}
