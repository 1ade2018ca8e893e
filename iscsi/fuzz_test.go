package iscsi_test

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"firn.io/firn/iscsi"
	"firn.io/firn/iscsi/pdu"
	"firn.io/firn/iscsi/scsi"
)

// request makes a PDU.
func request(op pdu.Opcode, flags byte, itt, cmdSN uint32, data []byte, set func(*pdu.Header)) []byte {
	var h pdu.Header
	h.SetOpcode(op)
	h[1] = flags
	h.SetWord(pdu.AtITT, itt)
	h.SetWord(pdu.AtTTT, pdu.NoTag)
	h.SetWord(pdu.AtCmdSN, cmdSN)
	h.SetDataLen(len(data))
	if set != nil {
		set(&h)
	}
	p := append(h[:], data...)
	return append(p, make([]byte, pdu.Padded(len(data))-len(data))...)
}

// loginPDU asks for the full feature phase at once.
func loginPDU(keys ...string) []byte {
	var text []byte
	for i := 0; i+1 < len(keys); i += 2 {
		text = pdu.AppendText(text, keys[i], keys[i+1])
	}
	return request(pdu.Login, pdu.Transit|1<<2|3, 1, 1, text, func(h *pdu.Header) { h.SetWord(pdu.AtTTT, 0) })
}

func normalLogin() []byte {
	return loginPDU("InitiatorName", "iqn.test:a", "TargetName", targetName, "SessionType", "Normal", "InitialR2T", "No", "FirstBurstLength", "8192")
}

func command(itt, cmdSN uint32, flags byte, edtl uint32, cdb []byte, data []byte) []byte {
	return request(pdu.Command, flags, itt, cmdSN, data, func(h *pdu.Header) {
		h.SetWord(pdu.AtEDTL, edtl)
		copy(h.CDB(), cdb)
	})
}

func write10(lba uint32, blocks uint16) []byte {
	c := make([]byte, 10)
	c[0] = 0x2a
	binary.BigEndian.PutUint32(c[2:], lba)
	binary.BigEndian.PutUint16(c[7:], blocks)
	return c
}

// FuzzConnection feeds a connection with anything, from its first byte or after
// a login: it ends, the server lives, and nothing is left behind.
func FuzzConnection(f *testing.F) {
	read := append(write10(0, 8)[:0:0], write10(0, 8)...)
	read[0] = 0x28
	f.Add(true, []byte{})
	f.Add(false, normalLogin())
	f.Add(false, loginPDU("InitiatorName", "iqn.test:a", "SessionType", "Discovery"))
	f.Add(true, command(2, 1, pdu.Final|pdu.Read, 4096, read, nil))
	f.Add(true, command(2, 1, pdu.Final|pdu.Write, 4096, write10(0, 8), make([]byte, 4096)))
	f.Add(true, append(command(2, 1, pdu.Write, 8192, write10(0, 16), nil), request(pdu.DataOut, pdu.Final, 2, 0, make([]byte, 8192), nil)...))
	f.Add(true, append(command(2, 1, pdu.Final|pdu.Write, 65536, write10(0, 128), nil), request(pdu.DataOut, pdu.Final, 2, 0, make([]byte, 512), func(h *pdu.Header) { h.SetWord(pdu.AtTTT, 1) })...))
	f.Add(true, append(command(2, 1, pdu.Final|pdu.Write, 65536, write10(0, 128), nil), request(pdu.TaskMgmt, pdu.Final|1, 3, 2, nil, func(h *pdu.Header) { h.SetWord(pdu.AtRefTag, 2) })...))
	f.Add(true, request(pdu.NopOut, pdu.Final, 2, 1, []byte("ping"), nil))
	f.Add(true, request(pdu.Text, pdu.Final, 2, 1, []byte("SendTargets=\x00"), nil))
	f.Add(true, request(pdu.TaskMgmt, pdu.Final|5, 2, 1, nil, nil))
	f.Add(true, request(pdu.Logout, pdu.Final, 2, 1, nil, nil))
	f.Add(true, command(9, 3, pdu.Final, 0, make([]byte, 6), nil)) // ahead of its turn
	dev := device(1<<20, 512)
	u, err := scsi.NewUnit(context.Background(), scsi.Config{Device: dev})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, login bool, p []byte) {
		s := iscsi.NewServer(&iscsi.Fixed{Targets: []iscsi.Target{{Name: targetName, LUNs: []iscsi.LUN{{Number: 0, Unit: u}}}}}, iscsi.Options{StallTimeout: time.Second})
		here, there := net.Pipe()
		over := make(chan struct{})
		go func() {
			defer close(over)
			_ = s.ServeConn(there)
		}()
		drained := make(chan struct{})
		go func() {
			defer close(drained)
			_, _ = io.Copy(io.Discard, here)
		}()
		if login {
			_, _ = here.Write(normalLogin())
		}
		_, _ = here.Write(p)
		here.Close()
		<-over
		<-drained
		if st := s.Stats(); st.Sessions != 0 {
			t.Errorf("%d sessions are left", st.Sessions)
		}
		if dev.Lent() != 0 {
			t.Errorf("%d loans are left", dev.Lent())
		}
	})
}
