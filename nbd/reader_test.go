package nbd_test

import (
	"io"
	"net"
	"testing"
	"time"

	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/device"
	"firn.io/firn/nbd/wire"
)

// endless is a net.Conn on which a client has sent a hello and then left reads
// of 4 KiB; replies vanish.
type endless struct {
	script
	hello []byte
	block []byte
	left  int
}

func (e *endless) Read(p []byte) (n int, err error) {
	if len(e.hello) > 0 {
		n = copy(p, e.hello)
		e.hello = e.hello[n:]
		return n, nil
	}
	// As many as a client has in flight.
	k := min(e.left, len(p)/wire.RequestLen, 32)
	if k == 0 {
		return 0, io.EOF
	}
	e.left -= k
	return copy(p, e.block[:k*wire.RequestLen]), nil
}

func (e *endless) Write(p []byte) (int, error) { return len(p), nil }

var _ net.Conn = (*endless)(nil)

// BenchmarkReaderPath is a read from memory without the sockets: what Firn
// itself adds to the two system calls that 32 requests share.
func BenchmarkReaderPath(b *testing.B) {
	d := blocktest.New(blocktest.Options{Name: "vol", Bytes: 1 << 20})
	if err := d.WriteAt(b.Context(), make([]byte, 1<<20), 0, 0); err != nil {
		b.Fatal(err)
	}
	for h := wire.SimpleReplies; h <= wire.StructuredReplies; h++ {
		b.Run(h.String(), func(b *testing.B) {
			conn := &endless{left: b.N, hello: wire.AppendClientFlags(nil, wire.ClientFixedNewstyle|wire.ClientNoZeroes)}
			if h == wire.StructuredReplies {
				conn.hello = wire.AppendOption(conn.hello, wire.OptStructuredReply, nil)
			}
			conn.hello = wire.AppendOption(conn.hello, wire.OptExportName, []byte("vol"))
			for i := range uint64(32) {
				conn.block = wire.AppendRequest(conn.block, h, wire.Request{Command: wire.CmdRead, Cookie: i, Offset: i << 12, Length: 4096})
			}
			s := nbd.NewServer(nbd.Fixed{*device.Export(d, nil)}, nbd.Options{Now: func() time.Time { return time.Time{} }})
			b.ReportAllocs()
			b.ResetTimer()
			if err := s.ServeConn(conn); err == nil {
				b.Fatal("the client left properly")
			}
			if n := s.Stats().MemoryReads; n != uint64(b.N) {
				b.Fatalf("%d of %d reads from memory", n, b.N)
			}
		})
	}
}
