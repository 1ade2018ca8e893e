package wire_test

import (
	"bytes"
	"reflect"
	"testing"

	"firn.io/firn/cluster/wire"
)

func copyRequests() []wire.CopyRequest {
	return []wire.CopyRequest{
		{ID: 1, Kind: wire.CopyOpen, Group: 7, Replica: 3, At: 1 << 40},
		{ID: 2, Kind: wire.CopyScan, Group: 7, View: 9, From: []byte{1}, To: []byte{5, 0, 0}},
		{ID: 3, Kind: wire.CopyData, Group: 7, View: 9, Runs: []wire.CopyRun{{Key: []byte{16, 1, 2}, Count: 16}, {Key: []byte{16, 1, 3}, Skip: 4, Count: 1}}},
		{ID: 4, Kind: wire.CopyClose, Group: 7, View: 9},
	}
}

func copyAnswers() []wire.CopyAnswer {
	return []wire.CopyAnswer{
		{ID: 1, Status: wire.CopyOK, View: 9, Bytes: 1 << 33},
		{ID: 2, Status: wire.CopyOK, View: 9, Next: []byte{5, 1}, Records: []wire.CopyRecord{{Key: []byte{5}, Value: []byte("abc")}, {Key: []byte{5, 0}}}},
		{ID: 3, Status: wire.CopyGone},
	}
}

func TestCopyMessagesRoundTrip(t *testing.T) {
	t.Parallel()
	for _, want := range copyRequests() {
		p := wire.AppendCopyRequest(nil, &want)
		var got wire.CopyRequest
		if err := wire.DecodeCopyRequest(p, &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%+v became %+v, %v", want, got, err)
		}
		for n := range p {
			if wire.DecodeCopyRequest(p[:n], &got) == nil {
				t.Errorf("%d of %d bytes of %+v decode", n, len(p), want)
			}
		}
		if wire.DecodeCopyRequest(append(p, 0), &got) == nil {
			t.Errorf("a byte too many after %+v", want)
		}
	}
	for _, want := range copyAnswers() {
		p := wire.AppendCopyAnswer(nil, &want)
		var got wire.CopyAnswer
		if err := wire.DecodeCopyAnswer(p, &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%+v became %+v, %v", want, got, err)
		}
		for n := range p {
			if wire.DecodeCopyAnswer(p[:n], &got) == nil {
				t.Errorf("%d of %d bytes of %+v decode", n, len(p), want)
			}
		}
	}
}

func FuzzDecodeCopyRequest(f *testing.F) {
	for _, q := range copyRequests() {
		f.Add(wire.AppendCopyRequest(nil, &q))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		var q wire.CopyRequest
		if wire.DecodeCopyRequest(p, &q) == nil && !bytes.Equal(wire.AppendCopyRequest(nil, &q), p) {
			t.Errorf("%x decodes as %+v, which encodes otherwise", p, q)
		}
	})
}

func FuzzDecodeCopyAnswer(f *testing.F) {
	for _, a := range copyAnswers() {
		f.Add(wire.AppendCopyAnswer(nil, &a))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		var a wire.CopyAnswer
		if wire.DecodeCopyAnswer(p, &a) == nil && !bytes.Equal(wire.AppendCopyAnswer(nil, &a), p) {
			t.Errorf("%x decodes as %+v, which encodes otherwise", p, a)
		}
	})
}
