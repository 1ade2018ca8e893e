package grpc

import (
	"encoding/binary"
	"io"
	"sync/atomic"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// A frame is one gRPC message: a head, a table with one row per message, the
// messages' headers and then all payloads, without padding. Little-endian.
//
//	 0  magic "FRN1"
//	 4  bytes of table and headers
//	 8  bytes of payloads
//	12  CRC32C of the first 12 bytes, the table and the headers
//	16  table: per message  type 1, zero 1, payloads 2, header bytes 4, then
//	    4 bytes of length per payload; a row of type 0 ends the table
//
// Payloads carry no checksum of the frame: each block has its own, made at the
// gateway and checked where the bytes are served.
const (
	frameMagic = "FRN1"
	headBytes  = 16
	rowBytes   = 8

	// maxMessageBytes bounds one message: an answer or an entry of 1 MiB, its
	// header, and what alignment adds.
	maxMessageBytes = transport.MaxHeaderBytes + 2<<20
	// maxFrameBytes bounds what is received: a frame is closed once it holds
	// MaxFrameBytes, so it is at most that and one message more.
	maxFrameBytes = transport.MaxFrameBytes + maxMessageBytes + 64<<10
	// maxMeta bounds table and headers of a frame.
	maxMeta = transport.MaxFrameBytes + 2*transport.MaxHeaderBytes
	// maxMessages bounds the messages of a frame, and maxPayloads its payloads:
	// however short, each takes a buffer of 4 KiB at the receiver.
	maxMessages = 8192
	maxPayloads = 4 * transport.MaxPayloads
)

// codecName is the content subtype; the server finds the codec by it, so that
// other services can live on the same server.
const codecName = "firn-frame"

func init() { encoding.RegisterCodecV2(codec{}) }

// frame is what the codec marshals and unmarshals. Marshal hands the payloads'
// holds to gRPC, which gives them back when the bytes are on the wire.
type frame struct {
	messages []transport.Message
}

type codec struct{}

// Name implements encoding.CodecV2.
func (codec) Name() string { return codecName }

// Marshal implements encoding.CodecV2.
func (codec) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*frame)
	if !ok {
		return nil, block.Errorf(block.Internal, "%T is not a frame", v)
	}
	return f.encode(), nil
}

// Unmarshal implements encoding.CodecV2.
func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*frame)
	if !ok {
		return block.Errorf(block.Internal, "%T is not a frame", v)
	}
	var err error
	r := data.Reader()
	defer r.Close()
	f.messages, err = decodeFrame(r, data.Len())
	return err
}

// metaBytes is what a message adds to table and headers.
func metaBytes(m *transport.Message) int { return rowBytes + 4*len(m.Payloads) + len(m.Header) }

func (f *frame) encode() mem.BufferSlice {
	meta, bytes, bufs := rowBytes, 0, 1
	for i := range f.messages {
		m := &f.messages[i]
		meta += metaBytes(m)
		bufs += len(m.Payloads)
		for _, p := range m.Payloads {
			bytes += p.Len()
		}
	}
	head := mem.DefaultBufferPool().Get(headBytes + meta)
	b := append((*head)[:0], frameMagic...)
	b = binary.LittleEndian.AppendUint32(b, uint32(meta))
	b = binary.LittleEndian.AppendUint32(b, uint32(bytes))
	b = append(b, 0, 0, 0, 0)
	for i := range f.messages {
		m := &f.messages[i]
		b = append(b, byte(m.Type), 0)
		b = binary.LittleEndian.AppendUint16(b, uint16(len(m.Payloads)))
		b = binary.LittleEndian.AppendUint32(b, uint32(len(m.Header)))
		for _, p := range m.Payloads {
			b = binary.LittleEndian.AppendUint32(b, uint32(p.Len()))
		}
	}
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0)
	for i := range f.messages {
		b = append(b, f.messages[i].Header...)
	}
	binary.LittleEndian.PutUint32(b[12:], frameCRC(b))
	*head = b

	out := make(mem.BufferSlice, 1, bufs)
	out[0] = mem.NewBuffer(head, mem.DefaultBufferPool())
	hold := &lent{}
	for i := range f.messages {
		for _, p := range f.messages[i].Payloads {
			hold.payloads = append(hold.payloads, p)
		}
	}
	hold.left.Store(int32(len(hold.payloads)))
	hold.bytes = make([][]byte, len(hold.payloads))
	for i, p := range hold.payloads {
		hold.bytes[i] = p.Bytes()
		if mem.IsBelowBufferPoolingThreshold(cap(hold.bytes[i])) {
			// gRPC would not tell us when it is done with it.
			hold.bytes[i] = append([]byte(nil), hold.bytes[i]...)
			out = append(out, mem.SliceBuffer(hold.bytes[i]))
			hold.Put(nil)
			continue
		}
		out = append(out, mem.NewBuffer(&hold.bytes[i], hold))
	}
	return out
}

func frameCRC(b []byte) uint32 {
	return block.UpdateCRC(block.CRC(b[:12]), b[headBytes:])
}

// lent is the payloads of a frame while gRPC holds their bytes. It is the
// mem.BufferPool that the bytes go back to; when all are back, so are the
// holds.
type lent struct {
	payloads []*payload.Buf
	bytes    [][]byte
	left     atomic.Int32
}

// Get implements mem.BufferPool.
func (*lent) Get(n int) *[]byte { b := make([]byte, n); return &b }

// Put implements mem.BufferPool.
func (l *lent) Put(*[]byte) {
	if l.left.Add(-1) == 0 {
		for _, p := range l.payloads {
			p.Release()
		}
		l.payloads = nil
	}
}

// decodeFrame reads a frame of total bytes. The headers share one array of
// their own; each payload is copied once, into a buffer of its own.
func decodeFrame(r io.Reader, total int) ([]transport.Message, error) {
	bad := func(what string) ([]transport.Message, error) {
		return nil, block.Errorf(block.Invalid, "frame: %s", what)
	}
	var head [headBytes]byte
	if total < headBytes+rowBytes || total > maxFrameBytes {
		return bad("size out of bounds")
	}
	if _, err := io.ReadFull(r, head[:]); err != nil || string(head[:4]) != frameMagic {
		return bad("unknown magic")
	}
	meta, bytes := binary.LittleEndian.Uint32(head[4:]), binary.LittleEndian.Uint32(head[8:])
	if meta > maxMeta || uint64(meta)+uint64(bytes)+headBytes != uint64(total) {
		return bad("parts do not add up to its size")
	}
	b := make([]byte, meta)
	if _, err := io.ReadFull(r, b); err != nil {
		return bad("cut short")
	}
	if block.UpdateCRC(block.CRC(head[:12]), b) != binary.LittleEndian.Uint32(head[12:]) {
		return bad("checksum of the headers is wrong")
	}
	rows, headers, err := checkTable(b, bytes)
	if err != nil {
		return nil, err
	}
	ms := make([]transport.Message, rows)
	fail := func() ([]transport.Message, error) {
		for i := range ms {
			ms[i].Release()
		}
		return bad("cut short")
	}
	table := b
	for i := range ms {
		m := &ms[i]
		n, h := int(binary.LittleEndian.Uint16(table[2:])), binary.LittleEndian.Uint32(table[4:])
		m.Type = transport.Type(table[0])
		m.Header, headers = headers[:h:h], headers[h:]
		table = table[rowBytes:]
		if n > 0 {
			m.Payloads = make([]*payload.Buf, 0, n)
		}
		for range n {
			p := payload.New(int(binary.LittleEndian.Uint32(table)))
			table = table[4:]
			m.Payloads = append(m.Payloads, p)
			if _, err := io.ReadFull(r, p.Bytes()); err != nil {
				return fail()
			}
		}
	}
	return ms, nil
}

// checkTable verifies that table and headers fill b and the payloads add up,
// before anything is allocated by what they claim.
func checkTable(b []byte, payloads uint32) (rows int, headers []byte, err error) {
	bad := func(what string) (int, []byte, error) {
		return 0, nil, block.Errorf(block.Invalid, "frame: %s", what)
	}
	var header, sum uint64
	count := 0
	t := b
	for {
		if len(t) < rowBytes {
			return bad("table without an end")
		}
		kind, n, h := t[0], int(binary.LittleEndian.Uint16(t[2:])), binary.LittleEndian.Uint32(t[4:])
		t = t[rowBytes:]
		if kind == 0 {
			break
		}
		count += n
		if rows++; rows > maxMessages || count > maxPayloads || n > transport.MaxPayloads || h > transport.MaxHeaderBytes || len(t) < 4*n {
			return bad("a message out of bounds")
		}
		header += uint64(h)
		for range n {
			sum += uint64(binary.LittleEndian.Uint32(t))
			t = t[4:]
		}
	}
	if header != uint64(len(t)) || sum != uint64(payloads) {
		return bad("messages do not add up")
	}
	return rows, t, nil
}
