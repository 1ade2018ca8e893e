package iscsi_test

import (
	"io"
	"net"
	"testing"

	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/iscsi"
	"firn.io/firn/iscsi/pdu"
)

const benchDepth = 32

// rawReader logs in and reads 4 KiB blocks at depth 32 by requests that are
// made ahead, so that what is measured is the target.
type rawReader struct {
	nc      net.Conn
	cmdSN   uint32
	batch   []byte
	answers []byte
}

func newRawReader(t testing.TB, addr string) *rawReader {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	r := &rawReader{nc: nc, cmdSN: 1, answers: make([]byte, benchDepth*(pdu.HeaderLen+4096))}
	if _, err := nc.Write(loginPDU("InitiatorName", "iqn.test:a", "TargetName", targetName, "SessionType", "Normal", "MaxRecvDataSegmentLength", "262144")); err != nil {
		t.Fatal(err)
	}
	var h pdu.Header
	if _, err := io.ReadFull(nc, h[:]); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(nc, make([]byte, pdu.Padded(h.DataLen()))); err != nil {
		t.Fatal(err)
	}
	// The power on attention.
	if _, err := nc.Write(command(1, r.cmdSN, pdu.Final, 0, make([]byte, 6), nil)); err != nil {
		t.Fatal(err)
	}
	r.cmdSN++
	if _, err := io.ReadFull(nc, h[:]); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(nc, make([]byte, pdu.Padded(h.DataLen()))); err != nil {
		t.Fatal(err)
	}
	for i := range benchDepth {
		cdb := write10(uint32(8*i), 8)
		cdb[0] = 0x28
		r.batch = append(r.batch, command(uint32(i)+2, 0, pdu.Final|pdu.Read, 4096, cdb, nil)...)
	}
	return r
}

// round sends 32 reads and takes their answers.
func (r *rawReader) round() error {
	for i := range benchDepth {
		h := (*pdu.Header)(r.batch[i*pdu.HeaderLen:])
		h.SetWord(pdu.AtCmdSN, r.cmdSN)
		r.cmdSN++
	}
	if _, err := r.nc.Write(r.batch); err != nil {
		return err
	}
	_, err := io.ReadFull(r.nc, r.answers)
	return err
}

// TestReadsAllocateNothing counts the allocations of reads that memory answers.
// Under the race detector the number means nothing.
func TestReadsAllocateNothing(t *testing.T) {
	addr, s := serve(t, device(1<<20, 512), iscsi.Access{})
	r := newRawReader(t, addr)
	round := func() {
		if err := r.round(); err != nil {
			t.Fatal(err)
		}
	}
	for range 10 {
		round()
	}
	if per := testing.AllocsPerRun(200, round) / benchDepth; per > 0.05 && !raceDetector {
		t.Errorf("%.3f allocations per read", per)
	}
	if s.Stats().Inline == 0 {
		t.Error("no read was answered from memory")
	}
}

func BenchmarkRead4K(b *testing.B) {
	for _, lend := range []bool{true, false} {
		name := "memory"
		if !lend {
			name = "workers"
		}
		b.Run(name, func(b *testing.B) {
			addr, _ := serve(b, blocktest.New(blocktest.Options{Bytes: 1 << 20, Name: "vol", NoLending: !lend}), iscsi.Access{})
			r := newRawReader(b, addr)
			b.SetBytes(4096)
			b.ReportAllocs()
			b.ResetTimer()
			for i := 0; i < b.N; i += benchDepth {
				if err := r.round(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
