package grpc

import (
	"bytes"
	"encoding/binary"
	"testing"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/payload"
)

func encoded(ms ...transport.Message) []byte {
	f := &frame{messages: ms}
	return f.encode().Materialize()
}

func decoded(p []byte) ([]transport.Message, error) { return decodeFrame(bytes.NewReader(p), len(p)) }

func samples() [][]byte {
	return [][]byte{
		encoded(),
		encoded(transport.Message{Type: transport.TypeRequest, Header: []byte("header")}),
		encoded(
			transport.Message{Type: transport.TypeRaft, Header: []byte("one"), Payloads: []*payload.Buf{payload.Copy(make([]byte, 4096)), payload.Copy([]byte("small"))}},
			transport.Message{Type: transport.TypeHeartbeat},
			transport.Message{Type: transport.TypeResponse, Header: make([]byte, 300), Payloads: []*payload.Buf{payload.New(0)}},
		),
	}
}

func TestEveryFlippedBitOfTheHeadIsFound(t *testing.T) {
	p := samples()[2]
	payloads := int(binary.LittleEndian.Uint32(p[8:]))
	for i := range (len(p) - payloads) * 8 {
		q := bytes.Clone(p)
		q[i/8] ^= 1 << (i % 8)
		if ms, err := decoded(q); err == nil {
			t.Fatalf("bit %d flipped: still %d messages", i, len(ms))
		}
	}
	for n := range len(p) {
		if _, err := decoded(p[:n]); err == nil {
			t.Fatalf("cut to %d bytes: still a frame", n)
		}
	}
}

func FuzzFrame(f *testing.F) {
	for _, p := range samples() {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) >= headBytes {
			// Let the fuzzer past the checksum.
			if meta := binary.LittleEndian.Uint32(p[4:]); uint64(meta) <= uint64(len(p)-headBytes) {
				p = bytes.Clone(p)
				binary.LittleEndian.PutUint32(p[12:], frameCRC(p[:headBytes+meta]))
			}
		}
		ms, err := decoded(p)
		if err != nil {
			return
		}
		total := 0
		for i := range ms {
			total += ms[i].Bytes()
		}
		if total > len(p) {
			t.Fatalf("%d bytes of messages out of a frame of %d", total, len(p))
		}
		again, err := decoded(encoded(ms...))
		if err != nil || len(again) != len(ms) {
			t.Fatalf("encoded again: %d messages, %v", len(again), err)
		}
	})
}
